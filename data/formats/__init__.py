"""Importers: one file for each annotation format, each a generator of rows of the schema."""
