"""The index of a data set: what its shards hold, and where. Built once, used by all readers."""

from pipeline.data.index.build import build_index
from pipeline.data.index.reader import Index

__all__ = ["Index", "build_index"]
