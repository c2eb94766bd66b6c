"""Where shards lie, and how bytes of them are read: the only place that opens a shard.

directory, URL, glob or brace pattern --find_shards--> root and names
root --open_storage--> Storage; name, offset, size --Storage.read--> bytes
"""

from pipeline.data.storage.base import ShardReadError, ShardState, Storage, TransferCounters
from pipeline.data.storage.opening import open_storage
from pipeline.data.storage.patterns import FoundShards, find_shards, is_url
from pipeline.data.storage.policy import RemotePolicy

__all__ = [
    "FoundShards",
    "RemotePolicy",
    "ShardReadError",
    "ShardState",
    "Storage",
    "TransferCounters",
    "find_shards",
    "is_url",
    "open_storage",
]
