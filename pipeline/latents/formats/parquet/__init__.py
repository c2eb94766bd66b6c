"""Parquet files with the schema of Hugging Face `datasets`."""
