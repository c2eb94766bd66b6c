"""Making webdataset shards and their index out of something else."""

from pipeline.data.pack.pack import pack_folder, pack_sprites

__all__ = ["pack_folder", "pack_sprites"]
