"""Bytes of samples: from rows of the index to pieces in memory, in few, long reads.

    run of a lane -> rows of a few shards -> byte ranges, coalesced -> Storage -> slabs, and where
                                             in its slab each sample's member lies

What is done per sample is done for a whole window at once: a thread that handles samples one by one
in Python keeps the decoding threads from running.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.order import Order, Run
from pipeline.data.slabs import Slab, Slabs
from pipeline.data.storage import Storage
from pipeline.data.table import MemberRanges

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


def plan_reads(offset: Ints, num_bytes: Ints) -> Iterator[tuple[Ints, int, int]]:
    """Join ranges [n] of a shard into few reads: (which ranges, offset, bytes) of each.

    Ranges at -1 are missing and belong to no read.
    """
    places = np.argsort(offset, kind="stable")
    places = places[np.searchsorted(offset[places], 0) :]
    starts = offset[places]
    reached = np.maximum.accumulate(starts + num_bytes[places])
    cuts = (np.flatnonzero(starts[1:] - reached[:-1] > MAX_GAP_BYTES) + 1).tolist()
    for first, end in pairwise([0, *cuts, len(places)]):
        if first < end:
            base = int(starts[first])
            yield places[first:end], base, int(reached[end - 1]) - base


def read_ranges(storage: Storage, name: str, offset: Ints, num_bytes: Ints) -> list[bytes | None]:
    """Read byte ranges [n] of a shard; None where the offset is -1."""
    found: list[bytes | None] = [None] * len(offset)
    for places, base, length in plan_reads(offset, num_bytes):
        piece = storage.read(name, base, length)
        starts = offset[places] - base
        stops = starts + num_bytes[places]
        for place, *bounds in zip(places.tolist(), starts.tolist(), stops.tolist(), strict=True):
            found[place] = piece[slice(*bounds)]
    return found


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
        num = len(positions)
        offset, num_bytes, uid, label, start = np.zeros((5, num), np.int64)
        crc32 = np.full(num, -1, np.int64)
        reads: list[Read] = []
        reach = 0  # bytes of the slab that are spoken for
        for number in np.unique(shard).tolist():
            in_shard = np.flatnonzero(shard == number)
            table = self._index.table(number)
            rows = table.rows_of(self._split_number)[row[in_shard]]
            ranges = table.ranges_of(self._suffixes)
            offset[in_shard] = ranges.offset[rows]
            num_bytes[in_shard] = ranges.num_bytes[rows]
            for places, base, length in plan_reads(offset[in_shard], num_bytes[in_shard]):
                reads.append(Read(number, base, length))
                start[in_shard[places]] = reach - base
                reach += length
            uid[in_shard] = self._index.first_uids[number] + rows
            label[in_shard] = table.labels[rows]
            if self._verify_checksums:
                crc32[in_shard] = ranges.crc32[rows]
        start += offset
        slab = self._read(reads, reach)
        slabs = np.full(num, slab, object)
        slabs[offset < 0] = None
        draws = self._draw(np.full(num, run.epoch, np.int64), uid)
        return Samples(slabs, start, start + num_bytes, crc32, uid, label, draws, reads)

    def _read(self, reads: Sequence[Read], num_bytes: int) -> Slab:
        """Make all reads of a run, one behind the other in one slab."""
        slab = self._slabs.take(num_bytes)
        memory = memoryview(slab.memory)
        for read in reads:
            if read.num_bytes:
                name = self._index.shards[read.shard].name
                self._storage.read_into(name, read.offset, memory[: read.num_bytes])
            memory = memory[read.num_bytes :]
        return slab
