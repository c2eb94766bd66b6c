"""Two-dimensional `.npy` matrices beside a Parquet file of the rows' metadata."""
