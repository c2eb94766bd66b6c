"""Checks of an export, in levels: from the listing of its files to encoding again."""
