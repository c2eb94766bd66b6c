"""Where shards lie, and how bytes of them are read: the only place that opens a shard.

directory, URL, glob or brace pattern --patterns.find_shards--> root and names
root --open_storage--> Storage; name, offset, size --Storage.read--> bytes

`patterns` is no part of what is imported here: it expands by webdataset's rules, and webdataset
imports torch, which a reader of latents must not.
"""

from pipeline.data.storage.base import ShardReadError, ShardState, Storage, TransferCounters
from pipeline.data.storage.opening import is_url, open_storage
from pipeline.data.storage.policy import RemotePolicy

__all__ = [
    "RemotePolicy",
    "ShardReadError",
    "ShardState",
    "Storage",
    "TransferCounters",
    "is_url",
    "open_storage",
]
