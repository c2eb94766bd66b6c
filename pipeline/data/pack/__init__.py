"""Making webdataset shards and their index out of something else: see `pack.pack`."""
