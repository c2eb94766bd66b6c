"""Where shards lie, and how bytes of them are read: nothing else opens a shard.

directory, URL, glob or brace pattern --find_shards--> root and names
root --open_storage--> Storage; name, offset, size --Storage.read--> bytes
"""

from pathlib import Path

from pipeline.data.storage.base import ShardReadError, ShardState, Storage, TransferCounters
from pipeline.data.storage.local import LocalStorage
from pipeline.data.storage.patterns import FoundShards, find_shards, is_url

__all__ = [
    "FoundShards",
    "ShardReadError",
    "ShardState",
    "Storage",
    "TransferCounters",
    "find_shards",
    "is_url",
    "open_storage",
]


def open_storage(root: str | Path) -> Storage:
    """Return the store of the shards below `root`."""
    return LocalStorage(str(root))
