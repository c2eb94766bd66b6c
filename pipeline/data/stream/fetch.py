"""Bytes of samples: from rows of the index to pieces in memory, in few, long reads.

    run of a lane -> rows of a few shards -> byte ranges, coalesced -> Storage -> slabs, and where
                                             in its slab each sample's member lies

What is done per sample is done for a whole window at once: a thread that handles samples one by one
in Python keeps the decoding threads from running.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.index.table import MemberRanges
from pipeline.data.order import Order, Run
from pipeline.data.storage import Storage
from pipeline.data.stream.slabs import Slabs

Ints = NDArray[np.int64]
# (epochs [n], uids [n]) -> float32 [n, num_draws]
Draw = Callable[[Ints, Ints], NDArray[np.float32]]

# Read over gaps up to this size: one longer read is cheaper than two. Larger gaps appear where a
# small split is read out of shards that mostly hold another.
MAX_GAP_BYTES = 32 << 10


class Read(NamedTuple):
    """One read of a shard."""

    shard: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Samples:
    """Members of samples [n] in memory: `slabs` [n] is None where a sample lacks the member."""

    slabs: NDArray[Any]
    start: Ints  # of the member in its slab
    stop: Ints
    crc32: Ints  # of the member, -1 = unknown
    uid: Ints
    label: Ints
    draws: NDArray[np.float32]  # [n, num_draws]
    reads: list[Read]

    @property
    def num_bytes_read(self) -> int:
        """Bytes that came from the store."""
        return sum(read.num_bytes for read in self.reads)

    @property
    def num_bytes_wanted(self) -> int:
        """Bytes of the members themselves."""
        return int((self.stop - self.start)[self.slabs != None].sum())  # noqa: E711 - elementwise


def plan_reads(shard: Ints, offset: Ints, num_bytes: Ints) -> tuple[list[Read], Ints]:
    """Join ranges [n] of shards into few reads, to be laid one behind the other in memory.

    Returns them and where in that memory each range starts. Ranges at -1 are missing: they belong
    to no read and start nowhere (-1).
    """
    start = np.full(len(offset), -1, np.int64)
    places = np.flatnonzero(offset >= 0)
    if len(places) == 0:
        return [], start
    # One line of addresses for all shards, farther apart than any gap that is read over.
    stride = int((offset + num_bytes).max()) + MAX_GAP_BYTES + 1
    address = shard[places] * stride + offset[places]
    ascending = np.argsort(address, kind="stable")
    places, address = places[ascending], address[ascending]
    reached = np.maximum.accumulate(address + num_bytes[places])
    is_first = np.append(True, address[1:] - reached[:-1] > MAX_GAP_BYTES)
    first = np.flatnonzero(is_first)
    length = reached[np.append(first[1:], len(places)) - 1] - address[first]
    shift = np.cumsum(length) - length - address[first]
    start[places] = address + shift[np.cumsum(is_first) - 1]
    firsts = places[first]
    columns = (shard[firsts].tolist(), offset[firsts].tolist(), length.tolist())
    return list(map(Read, *columns)), start


def read_ranges(storage: Storage, name: str, offset: Ints, num_bytes: Ints) -> list[bytes | None]:
    """Read byte ranges [n] of a shard; None where the offset is -1."""
    reads, starts = plan_reads(np.zeros_like(offset), offset, num_bytes)
    memory = memoryview(bytearray(sum(read.num_bytes for read in reads)))
    _read_all(storage, [name], reads, memory)
    bounds = zip(starts.tolist(), (starts + num_bytes).tolist(), strict=True)
    return [bytes(memory[start:stop]) if start >= 0 else None for start, stop in bounds]


def _read_all(
    storage: Storage, names: Sequence[str], reads: Sequence[Read], memory: memoryview
) -> None:
    """Make all reads, one behind the other in memory; `names` of the shards by their numbers."""
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


class Fetcher:
    """Fetch what an order asks for; every method may be called from several threads at once."""

    def __init__(
        self,
        index: Index,
        storage: Storage,
        order: Order,
        *,
        split: str,
        suffixes: Sequence[str],
        draw: Draw,
        verify_checksums: bool = False,
    ) -> None:
        """`verify_checksums`: hand the members' CRC-32 on, to be compared."""
        self._index = index
        self._names = [shard.name for shard in index.shards]
        self._storage = storage
        self._order = order
        self._split_number = index.split_number(split)
        self._suffixes = tuple(suffixes)
        self._draw = draw
        self._verify_checksums = verify_checksums
        self._slabs = Slabs()

    def fetch(self, run: Run, positions: Ints) -> Samples:
        """Read the samples at some positions of a run's window, in the order of `positions`.

        Raises ShardReadError if a shard is not what the index says.
        """
        shard, row = self._order.window(run.epoch, run.lane, run.window)
        shard, row = shard[positions], row[positions]
        offset, num_bytes, crc32, label, uid = self._columns(shard, row)
        reads, start = plan_reads(shard, offset, num_bytes)
        slab = self._slabs.take(sum(read.num_bytes for read in reads))
        _read_all(self._storage, self._names, reads, memoryview(slab.memory))
        slabs = np.full(len(shard), slab, object)
        slabs[offset < 0] = None
        if not self._verify_checksums:
            crc32 = np.full(len(shard), -1, np.int64)
        draws = self._draw(np.full(len(shard), run.epoch, np.int64), uid)
        return Samples(slabs, start, start + num_bytes, crc32, uid, label, draws, reads)

    def _columns(self, shard: Ints, row: Ints) -> Ints:
        """[5, n] of samples: offset, bytes and CRC-32 of the member, label, uid."""
        columns = np.empty((5, len(shard)), np.int64)
        by_shard = np.argsort(shard, kind="stable")
        numbers, firsts = np.unique(shard[by_shard], return_index=True)
        ends = [*firsts[1:].tolist(), len(shard)]
        for number, first, end in zip(numbers.tolist(), firsts.tolist(), ends, strict=True):
            places = by_shard[first:end]
            table = self._index.table(number)
            of_split = table.split_columns(self._split_number, self._suffixes)
            found = of_split[:, row[places]]
            found[4] += self._index.first_uids[number]
            columns[:, places] = found
        return columns
