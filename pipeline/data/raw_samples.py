"""Raw samples of one rank: the bytes of every member, in slot order, read one window ahead.

RankSlots -> stream positions, step by step -> windows of each lane -> byte ranges of all
members (threads) -> dicts as webdataset's own reader makes them
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.index.members import read_ranges
from pipeline.data.index.table import ShardTable
from pipeline.data.order import Order, Run
from pipeline.data.order.slots import RankSlots
from pipeline.data.storage import Storage, is_url

THREAD_NAME = "raw-read"

Ints = NDArray[np.int64]
Sample = dict[str, Any]
ReadWindow = Callable[[Run, Ints], list[Sample]]


def raw_samples(
    index: Index, slots: RankSlots, *, storage: Storage, split: str, threads: int
) -> Iterator[Sample]:
    """Yield the samples of a rank in slot order.

    Dicts: `__key__`, `__url__`, bytes by suffix, and `__local_path__` unless the shards are remote.
    At most two windows of each lane are in memory. Closes the storage at the end. Raises
    ShardReadError.
    """
    for number, shard in enumerate(index.shards):
        storage.expect(shard.name, index.expected_state(number, storage.root))
    pool = ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME)
    read = partial(_read_window, index, storage, slots.order, split)
    try:
        lanes = {
            lane_slot: _LaneReader(slots, lane_slot, read, pool) for lane_slot in slots.lane_slots
        }
        step = slots.first_step
        while not slots.is_over(step):
            for position in slots.positions(step).tolist():
                yield lanes[position % slots.order.lanes].take()
            step += 1
    finally:
        _stop(pool, storage)


class _LaneReader:
    """One lane slot's samples, read one window ahead."""

    def __init__(
        self, slots: RankSlots, lane_slot: int, read: ReadWindow, pool: ThreadPoolExecutor
    ) -> None:
        self._slots, self._lane_slot, self._read, self._pool = slots, lane_slot, read, pool
        self._turn = slots.first_step * slots.order.lane_share
        self._samples: deque[Sample] = deque()
        self._next = self._request()

    def take(self) -> Sample:
        """Return the next sample; raise the error of its read, if any."""
        while not self._samples:
            self._samples.extend(self._next.result())
            self._next = self._request()
        return self._samples.popleft()

    def _request(self) -> "Future[list[Sample]]":
        order = self._slots.order
        run = order.run_at(self._lane_slot, self._turn)
        self._turn = run.next_turn
        turns = np.arange(run.turn, run.next_turn)
        ours = self._slots.includes(turns * order.lanes + self._lane_slot)
        return self._pool.submit(self._read, run, (turns - run.turn + run.start)[ours])


def _read_window(
    index: Index, storage: Storage, order: Order, split: str, run: Run, positions: Ints
) -> list[Sample]:
    """Read the samples at some positions of a run's window, in the order of `positions`."""
    if len(positions) == 0:
        return []
    shard, row = order.window(run.epoch, run.lane, run.window)
    shard, row = shard[positions], row[positions]
    samples: list[Sample] = [{}] * len(positions)
    for number in np.unique(shard).tolist():
        chosen = np.flatnonzero(shard == number)
        table, name = index.table(number), index.shards[number].name
        rows = table.rows_of(index.split_number(split))[row[chosen]]
        found = _read_shard(storage, name, table, rows)
        for i, sample in zip(chosen.tolist(), found, strict=True):
            samples[i] = sample
    return samples


def _read_shard(storage: Storage, name: str, table: ShardTable, rows: Ints) -> Iterator[Sample]:
    members = [table.members(row) for row in rows.tolist()]
    ranges = np.array([where for m in members for where in m.values()], np.int64).reshape(-1, 2)
    contents = iter(read_ranges(storage, name, ranges[:, 0], ranges[:, 1]))
    url = storage.where(name)
    extra = {} if is_url(url) else {"__local_path__": url}
    for key, suffixes in zip(table.keys(rows), members, strict=True):
        data = {suffix: next(contents) for suffix in suffixes}
        yield {"__key__": key, "__url__": url, **data, **extra}


def _stop(pool: ThreadPoolExecutor, storage: Storage) -> None:
    if threading.current_thread().name.startswith(THREAD_NAME):
        # Garbage collection may run in a thread of this pool, which cannot wait for itself.
        threading.Thread(target=_stop, args=(pool, storage)).start()
        return
    with closing(storage):
        pool.shutdown(cancel_futures=True)
