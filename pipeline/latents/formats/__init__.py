"""The formats of exports: one folder each with a writer and a reader; the readers by kind.

Add a format: a ShardReader, and its name below, the fastest first: of several formats in an export
the first one is read.
"""

from collections.abc import Mapping

from pipeline.latents.formats.npy.reader import NpyShard
from pipeline.latents.formats.parquet.reader import ParquetShard
from pipeline.latents.formats.reading import ShardReader
from pipeline.latents.formats.safetensors.reader import SafetensorsShard
from pipeline.latents.formats.tar.reader import TarShard

READERS: Mapping[str, type[ShardReader]] = {
    "npy": NpyShard,
    "safetensors": SafetensorsShard,
    "parquet": ParquetShard,
    "tar": TarShard,
}

__all__ = ["READERS", "ShardReader"]
