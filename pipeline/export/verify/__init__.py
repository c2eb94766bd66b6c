"""What proves an export: its levels, from listing to encoding again."""
