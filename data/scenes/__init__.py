"""Drawn scenes: pictures, expressions about them, tasks, and the rows made of both."""
