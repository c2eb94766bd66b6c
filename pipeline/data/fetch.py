"""Bytes of samples: from rows of the index to members in memory, in few, long reads.

Run of a lane -> rows of a few shards -> byte ranges, coalesced -> Storage.read -> one bytes
                                                            object per sample, its key and label
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.order import Order, Run
from pipeline.data.storage import Storage
from pipeline.data.table import MemberRanges

Ints = NDArray[np.int64]

# Read over gaps up to this size: one longer read is cheaper than two. Larger gaps appear where a
# small split is read out of shards that mostly hold another.
MAX_GAP_BYTES = 32 << 10
NO_LABEL = -1
LABEL_SUFFIXES = ("cls",)


@dataclass(frozen=True)
class Samples:
    """Samples in memory: `data` is None where the wanted member is missing."""

    data: list[bytes | None]
    keys: list[str]
    uid: Ints
    shard: Ints
    label: Ints
    num_bytes_read: int
    num_reads: int


def read_members(
    storage: Storage, name: str, wanted: Sequence[MemberRanges], rows: Ints
) -> tuple[list[list[bytes | None]], list[int]]:
    """Read members of some rows of a shard: a list per kind wanted, and the size of every read."""
    offset = np.concatenate([ranges.offset[rows] for ranges in wanted])
    num_bytes = np.concatenate([ranges.num_bytes[rows] for ranges in wanted])
    places = np.argsort(offset, kind="stable")
    places = places[np.searchsorted(offset[places], 0) :]  # without the missing ones, at -1
    starts = offset[places]
    stops = starts + num_bytes[places]
    cuts = (np.flatnonzero(starts[1:] - stops[:-1] > MAX_GAP_BYTES) + 1).tolist()

    data: list[bytes | None] = [None] * len(offset)
    sizes: list[int] = []
    for first, last in zip([0, *cuts], [*cuts, len(places)], strict=True):
        if first == last:
            continue
        base = int(starts[first])
        piece = storage.read(name, base, int(stops[last - 1]) - base)
        sizes.append(len(piece))
        chosen = slice(first, last)
        bounds = zip((starts[chosen] - base).tolist(), (stops[chosen] - base).tolist(), strict=True)
        for place, (start, stop) in zip(places[chosen].tolist(), bounds, strict=True):
            data[place] = piece[start:stop]
    num = len(rows)
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
        self, index: Index, storage: Storage, order: Order, *, split: str, suffixes: Sequence[str]
    ) -> None:
        self._index = index
        self._storage = storage
        self._order = order
        self._split_number = index.split_number(split)
        self._suffixes = tuple(suffixes)

    def fetch(self, run: Run, positions: Ints) -> Samples:
        """Read the samples at some positions of a run's window, in the order of `positions`.

        Raises ShardReadError if a shard is not what the index says.
        """
        shard, row = self._order.window(run.epoch, run.lane, run.window)
        shard, row = shard[positions], row[positions]
        num = len(positions)
        data: list[bytes | None] = [None] * num
        keys = [""] * num
        uid, label = np.empty(num, np.int64), np.full(num, NO_LABEL, np.int64)
        sizes: list[int] = []

        forward = np.lexsort((row, shard))  # each shard's rows in the order of the tar
        cuts = np.flatnonzero(np.diff(shard[forward])) + 1
        for places in np.split(forward, cuts):
            sizes += self._read_shard(int(shard[places[0]]), row, places, data, keys, uid, label)
        return Samples(data, keys, uid, shard, label, sum(sizes), len(sizes))

    def _read_shard(
        self,
        shard: int,
        row: Ints,
        places: Ints,
        data: list[bytes | None],
        keys: list[str],
        uid: Ints,
        label: Ints,
    ) -> list[int]:
        """Fill the places of one shard's samples."""
        table = self._index.table(shard)
        rows = table.rows_of(self._split_number)[row[places]]
        wanted = [table.ranges_of(self._suffixes)]
        if table.has_suffix(LABEL_SUFFIXES[0]):
            wanted.append(table.ranges_of(LABEL_SUFFIXES))
        members, sizes = read_members(self._storage, self._index.shards[shard].name, wanted, rows)
        uid[places] = self._index.first_uids[shard] + rows
        if len(wanted) == 2:
            label[places] = [parse_label(text) for text in members[1]]
        for place, content, key in zip(places.tolist(), members[0], table.keys(rows), strict=True):
            data[place] = content
            keys[place] = key
        return sizes
