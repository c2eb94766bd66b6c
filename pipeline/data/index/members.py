"""Bytes of members: byte ranges of shards, joined into few, long reads.

rows of a shard -> byte ranges of their members -> coalesced reads -> Storage -> bytes
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.table import MemberRanges
from pipeline.data.storage import Storage

Ints = NDArray[np.int64]


class ShardRead(NamedTuple):
    """Consecutive bytes of a shard, for one request."""

    shard: int
    offset: int
    num_bytes: int


def plan_reads(
    shard: Ints, offset: Ints, num_bytes: Ints, max_gap: int
) -> tuple[list[ShardRead], Ints]:
    """Join ranges [n] of shards into few reads, whose bytes are stored consecutively in memory.

    max_gap: bytes between two ranges that are read over at most, see `Storage.max_gap_bytes`.
    Returns the reads and the start of each range in that memory. Ranges at -1 are missing: they
    belong to no read, and their start is -1.
    """
    start = np.full(len(offset), -1, np.int64)
    present = np.flatnonzero(offset >= 0)
    if len(present) == 0:
        return [], start
    # One address space for all shards, separated by more than any gap that is read over.
    stride = int((offset + num_bytes).max()) + max_gap + 1
    address = shard[present] * stride + offset[present]
    ascending = np.argsort(address, kind="stable")
    present, address = present[ascending], address[ascending]
    reached = np.maximum.accumulate(address + num_bytes[present])
    is_first = np.append(True, address[1:] - reached[:-1] > max_gap)
    first = np.flatnonzero(is_first)
    length = reached[np.append(first[1:], len(present)) - 1] - address[first]
    shift = np.cumsum(length) - length - address[first]
    start[present] = address + shift[np.cumsum(is_first) - 1]
    firsts = present[first]
    columns = (shard[firsts].tolist(), offset[firsts].tolist(), length.tolist())
    return list(map(ShardRead, *columns)), start


def read_ranges(storage: Storage, name: str, offset: Ints, num_bytes: Ints) -> list[bytes | None]:
    """Read byte ranges [n] of a shard; None where the offset is -1."""
    zero, max_gap = np.zeros_like(offset), storage.max_gap_bytes
    reads, starts = plan_reads(zero, offset, num_bytes, max_gap)
    memory = memoryview(bytearray(sum(read.num_bytes for read in reads)))
    read_all(storage, [name], reads, memory)
    bounds = zip(starts.tolist(), (starts + num_bytes).tolist(), strict=True)
    return [bytes(memory[start:stop]) if start >= 0 else None for start, stop in bounds]


def read_all(
    storage: Storage, names: Sequence[str], reads: Sequence[ShardRead], memory: memoryview
) -> None:
    """Perform all reads, consecutively into `memory`; `names`: of the shards, by number."""
    for read in reads:
        if read.num_bytes:
            storage.read_into(names[read.shard], read.offset, memory[: read.num_bytes])
        memory = memory[read.num_bytes :]


def read_members(
    storage: Storage, name: str, wanted: Sequence[MemberRanges], rows: Ints
) -> list[list[bytes | None]]:
    """Read members of some rows of a shard: a list per kind wanted."""
    offset = np.concatenate([ranges.offset[rows] for ranges in wanted])
    num_bytes = np.concatenate([ranges.num_bytes[rows] for ranges in wanted])
    data, num = read_ranges(storage, name, offset, num_bytes), len(rows)
    return [data[kind * num : (kind + 1) * num] for kind in range(len(wanted))]
