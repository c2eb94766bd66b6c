"""Packing: other data -> webdataset shards and their index; see `pack.pack`."""
