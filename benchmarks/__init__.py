"""Our figures beside others' on the same data; each script prints a table and JSON."""
