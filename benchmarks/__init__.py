"""Comparisons with other libraries on the same data; each script prints a table and JSON."""
