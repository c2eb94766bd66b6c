"""What the shards of a data set hold, and where: made once, opened by everything that reads."""

from pipeline.data.index.build import build_index
from pipeline.data.index.reader import Index

__all__ = ["Index", "build_index"]
