"""Drawn scenes: images, expressions about them, tasks, and the rows made of both."""
