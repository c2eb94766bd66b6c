"""Storage of shards: finding them and reading their bytes. Only these modules open shards.

directory, URL, glob or brace pattern --patterns.find_shards--> root and names
root --open_storage--> Storage; name, offset, size --Storage.read--> bytes

`patterns` is not imported here: expanding a pattern imports webdataset, and so torch, which the
reader of latents must not need.
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
