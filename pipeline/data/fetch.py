"""Bytes of samples: from rows of the index to pieces in memory, in few, long reads.

    run of a lane -> rows of a few shards -> byte ranges, coalesced -> Storage.read -> pieces, and
                                             where in its piece each sample's member lies

What is done per sample is done for a whole window at once: a thread that handles samples one by one
in Python keeps the decoding threads from running.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.order import Order, Run
from pipeline.data.storage import Storage
from pipeline.data.table import MemberRanges, ShardTable

Ints = NDArray[np.int64]
# (epochs [n], uids [n]) -> float32 [n, num_draws]
Draw = Callable[[Ints, Ints], NDArray[np.float32]]

# Read over gaps up to this size: one longer read is cheaper than two. Larger gaps appear where a
# small split is read out of shards that mostly hold another.
MAX_GAP_BYTES = 32 << 10
NO_LABEL = -1
LABEL_SUFFIXES = ("cls",)
MISSING = -1  # as an offset: the sample has no such member


class Read(NamedTuple):
    """One read of a shard."""

    shard: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Ranges:
    """Members [n] in a shard: where they lie (-1 = missing), and in which piece that was read."""

    pieces: NDArray[Any]  # bytes, None where missing
    start: Ints  # within the piece
    stop: Ints
    reads: list[tuple[int, int]]  # (offset, bytes) of every read


@dataclass(frozen=True)
class Samples:
    """Samples [n] in memory: `pieces` [n] is None where the wanted member is missing."""

    pieces: NDArray[Any]
    start: Ints
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
        return int((self.stop - self.start).sum())


def read_ranges(storage: Storage, name: str, offset: Ints, num_bytes: Ints) -> Ranges:
    """Read byte ranges [n] of a shard, in as few reads as their gaps allow."""
    places = np.argsort(offset, kind="stable")
    places = places[np.searchsorted(offset[places], 0) :]  # without the missing ones
    starts = offset[places]
    stops = starts + num_bytes[places]
    reached = np.maximum.accumulate(stops)
    cuts = np.flatnonzero(starts[1:] - reached[:-1] > MAX_GAP_BYTES) + 1
    pieces = np.full(len(offset), None, object)
    start, stop = np.zeros((2, len(offset)), np.int64)
    reads: list[tuple[int, int]] = []
    for chosen in np.split(np.arange(len(places)), cuts):
        if len(chosen) == 0:
            continue
        base = int(starts[chosen[0]])
        piece = storage.read(name, base, int(reached[chosen[-1]]) - base)
        reads.append((base, len(piece)))
        at = places[chosen]
        pieces[at] = piece
        start[at], stop[at] = starts[chosen] - base, stops[chosen] - base
    return Ranges(pieces, start, stop, reads)


def read_members(
    storage: Storage, name: str, wanted: Sequence[MemberRanges], rows: Ints
) -> tuple[list[list[bytes | None]], list[int]]:
    """Read members of some rows of a shard: a list per kind wanted, and the size of every read."""
    offset = np.concatenate([ranges.offset[rows] for ranges in wanted])
    num_bytes = np.concatenate([ranges.num_bytes[rows] for ranges in wanted])
    found = read_ranges(storage, name, offset, num_bytes)
    cut = zip(found.pieces.tolist(), found.start.tolist(), found.stop.tolist(), strict=True)
    data = [None if piece is None else piece[start:stop] for piece, start, stop in cut]
    num = len(rows)
    sizes = [num_bytes for _, num_bytes in found.reads]
    return [data[kind * num : (kind + 1) * num] for kind in range(len(wanted))], sizes


def parse_label(text: bytes | None) -> int:
    """The class number in a `.cls` member; -1 without one, or where it is no int64."""
    try:
        label = int(text) if text is not None else NO_LABEL
    except ValueError:
        return NO_LABEL
    return label if -(2**63) <= label < 2**63 else NO_LABEL


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

    def fetch(self, run: Run, positions: Ints) -> Samples:
        """Read the samples at some positions of a run's window, in the order of `positions`.

        Raises ShardReadError if a shard is not what the index says.
        """
        shard, row = self._order.window(run.epoch, run.lane, run.window)
        shard, row = shard[positions], row[positions]
        num = len(positions)
        pieces = np.full(num, None, object)
        start, stop, uid = np.zeros((3, num), np.int64)
        label, crc32 = np.full((2, num), -1, np.int64)
        reads: list[Read] = []
        for number in np.unique(shard).tolist():
            places = np.flatnonzero(shard == number)
            table = self._index.table(number)
            rows = table.rows_of(self._split_number)[row[places]]
            ranges = table.ranges_of(self._suffixes)
            offset, num_bytes = ranges.offset[rows], ranges.num_bytes[rows]
            labels = self._label_ranges(table)
            if labels is not None:
                offset = np.concatenate([offset, labels.offset[rows]])
                num_bytes = np.concatenate([num_bytes, labels.num_bytes[rows]])
            found = read_ranges(self._storage, self._index.shards[number].name, offset, num_bytes)
            n = len(places)
            pieces[places] = found.pieces[:n]
            start[places], stop[places] = found.start[:n], found.stop[:n]
            uid[places] = self._index.first_uids[number] + rows
            if labels is not None:
                cut = zip(found.pieces[n:], found.start[n:], found.stop[n:], strict=True)
                label[places] = [parse_label(piece and piece[a:b]) for piece, a, b in cut]
            if self._verify_checksums:
                crc32[places] = ranges.crc32[rows]
            reads += [Read(number, *read) for read in found.reads]
        epoch = np.full(num, run.epoch, np.int64)
        draws = self._draw(epoch, uid)
        return Samples(pieces, start, stop, crc32, uid, label, draws, reads)

    def _label_ranges(self, table: ShardTable) -> MemberRanges | None:
        return table.ranges_of(LABEL_SUFFIXES) if table.has_suffix(LABEL_SUFFIXES[0]) else None
