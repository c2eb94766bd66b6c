"""Reading single rows out of a shard's files, one module per format of `pipeline.writers`.

Add a format: a ShardReader, and its name below, the fastest first: of several formats in an export
the first is read.
"""

from collections.abc import Mapping

from pipeline.latents.formats.base import ShardReader
from pipeline.latents.formats.npy import NpyShard
from pipeline.latents.formats.parquet import ParquetShard
from pipeline.latents.formats.safetensors import SafetensorsShard
from pipeline.latents.formats.tar import TarShard

READERS: Mapping[str, type[ShardReader]] = {
    "npy": NpyShard,
    "safetensors": SafetensorsShard,
    "parquet": ParquetShard,
    "tar": TarShard,
}

__all__ = ["READERS", "ShardReader"]
