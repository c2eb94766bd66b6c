"""Bytes of samples: from rows of the index to buffers in memory, by few, long reads.

    run of a lane -> rows of a few shards -> byte ranges, coalesced -> Storage -> read buffers,
                     and where in its buffer each sample's member lies

All work is vectorised over a window: a loop over samples in Python would block decoding threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.index.members import ShardRead, plan_reads, read_all
from pipeline.data.order import Order, Run
from pipeline.data.storage import Storage
from pipeline.data.stream.read_buffers import ReadBufferPool

Ints = NDArray[np.int64]
# (epochs [n], uids [n]) -> float32 [n, num_draws]
Draw = Callable[[Ints, Ints], NDArray[np.float32]]


@dataclass(frozen=True)
class FetchedSamples:
    """Members of samples [n] in memory."""

    read_buffers: NDArray[Any]  # [n]; None where the sample lacks the member
    start: Ints  # of the member in its buffer
    stop: Ints
    crc32: Ints  # of the member, -1 = unknown
    uid: Ints
    label: Ints
    draws: NDArray[np.float32]  # [n, num_draws]
    reads: list[ShardRead]

    @property
    def num_bytes_read(self) -> int:
        """Bytes that came from the store."""
        return sum(read.num_bytes for read in self.reads)

    @property
    def num_bytes_wanted(self) -> int:
        """Bytes of the members themselves."""
        has_member = self.read_buffers != None  # noqa: E711 - elementwise
        return int((self.stop - self.start)[has_member].sum())


class Fetcher:
    """Fetch the samples of an order's windows; thread-safe."""

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
        """`verify_checksums`: return the members' CRC-32 for comparison."""
        self._index = index
        self._names = [shard.name for shard in index.shards]
        self._storage = storage
        self._order = order
        self._split_number = index.split_number(split)
        self._suffixes = tuple(suffixes)
        self._draw = draw
        self._verify_checksums = verify_checksums
        self._pool = ReadBufferPool()

    def fetch(self, run: Run, positions: Ints) -> FetchedSamples:
        """Read the samples at some positions of a run's window, in the order of `positions`.

        Raises ShardReadError if a shard is not what the index says.
        """
        shard, row = self._order.window(run.epoch, run.lane, run.window)
        shard, row = shard[positions], row[positions]
        offset, num_bytes, crc32, label, uid = self._columns(shard, row)
        reads, start = plan_reads(shard, offset, num_bytes, self._storage.max_gap_bytes)
        read_buffer = self._pool.take(sum(read.num_bytes for read in reads))
        read_all(self._storage, self._names, reads, memoryview(read_buffer.memory))
        read_buffers = np.full(len(shard), read_buffer, object)
        read_buffers[offset < 0] = None
        if not self._verify_checksums:
            crc32 = np.full(len(shard), -1, np.int64)
        draws = self._draw(np.full(len(shard), run.epoch, np.int64), uid)
        return FetchedSamples(
            read_buffers, start, start + num_bytes, crc32, uid, label, draws, reads
        )

    def _columns(self, shard: Ints, row: Ints) -> Ints:
        """[5, n] of samples: offset, bytes and CRC-32 of the member, label, uid."""
        columns = np.empty((5, len(shard)), np.int64)
        by_shard = np.argsort(shard, kind="stable")
        numbers, firsts = np.unique(shard[by_shard], return_index=True)
        ends = [*firsts[1:].tolist(), len(shard)]
        for number, first, end in zip(numbers.tolist(), firsts.tolist(), ends, strict=True):
            of_shard = by_shard[first:end]
            table = self._index.table(number)
            of_split = table.split_columns(self._split_number, self._suffixes)
            found = of_split[:, row[of_shard]]
            found[4] += self._index.first_uids[number]
            columns[:, of_shard] = found
        return columns
