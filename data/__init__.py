"""Data: one schema for every source, the sources themselves, prompt templates and the collator."""
