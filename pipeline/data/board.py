"""Where fetched samples wait for their step: a ring of steps, one cell per slot.

    runs, in any order of arrival --fill--> cells --take--> the batch buffer of the next step

Only `missing` needs the engine's lock; cells are written once by one thread each.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import BatchBuffer
from pipeline.data.fetch import Samples
from pipeline.data.order import Order, Run

Ints = NDArray[np.int64]


class Board:
    """The steps ahead of a rank: which runs to request, which cells they fill, what is ready."""

    def __init__(
        self, order: Order, *, first_step: int, stop_step: int | None, rank: int, world: int
    ) -> None:
        self._order = order
        self._share = order.lane_share
        self.num_slots = order.batch_size // world
        self._first_slot = rank * self.num_slots
        self._first_step = first_step
        self.next_step = first_step
        self.stop_step = stop_step
        last_slot = self._first_slot + self.num_slots - 1
        lane_slots = range(self._first_slot // self._share, last_slot // self._share + 1)
        self._next_turn = dict.fromkeys(lane_slots, first_step * self._share)
        # One window ahead of the one being read; more where a step takes more than a window.
        self._turns_ahead = max(order.window_size, 2 * self._share)
        self._depth = (self._turns_ahead + order.window_size) // self._share + 3
        self.missing = np.full(self._depth, self.num_slots)
        num_cells = self._depth * self.num_slots
        self._data: list[bytes | None] = [None] * num_cells
        self._keys = [""] * num_cells
        self._whole = np.zeros((4, num_cells), np.int64)  # uid, epoch, label, shard
        self._weight = np.zeros(num_cells, np.float32)

    @property
    def is_done(self) -> bool:
        """Whether every step has been taken."""
        return self.stop_step is not None and self.next_step >= self.stop_step

    @property
    def is_ready(self) -> bool:
        """Whether the next step's samples are all here."""
        return not self.is_done and self.missing[self.next_step % self._depth] == 0

    def requests(self) -> list[tuple[int, Run]]:
        """(lane slot, run) to fetch now, most urgent first; each is returned once."""
        limit = self.next_step * self._share + self._turns_ahead
        if self.stop_step is not None:
            limit = min(limit, self.stop_step * self._share)
        wanted: list[tuple[int, Run]] = []
        for lane_slot, turn in self._next_turn.items():
            while turn < limit:
                run = self._order.run_at(lane_slot, turn)
                wanted.append((lane_slot, run))
                turn = run.next_turn
            self._next_turn[lane_slot] = turn
        wanted.sort(key=lambda item: item[1].turn)
        return wanted

    def cells_of(self, lane_slot: int, run: Run) -> tuple[Ints, Ints]:
        """(positions in the run's window, cells) of the samples that this rank delivers."""
        turns = np.arange(run.turn, run.next_turn)
        step, place = np.divmod(turns, self._share)
        slot = lane_slot * self._share + place - self._first_slot
        ours = (slot >= 0) & (slot < self.num_slots)
        if self.stop_step is not None:
            ours &= step < self.stop_step
        cells = (step % self._depth) * self.num_slots + slot
        return (turns - run.turn + run.start)[ours], cells[ours]

    def fill(self, run: Run, cells: Ints, samples: Samples) -> None:
        """Put fetched samples into their cells; `arrived` tells the steps afterwards."""
        self._whole[0, cells] = samples.uid
        self._whole[1, cells] = run.epoch
        self._whole[2, cells] = samples.label
        self._whole[3, cells] = samples.shard
        self._weight[cells] = 0 if run.repeated else 1
        for cell, data, key in zip(cells.tolist(), samples.data, samples.keys, strict=True):
            self._data[cell] = data
            self._keys[cell] = key

    def arrived(self, cells: Ints) -> None:
        """Count filled cells; the caller holds the lock."""
        self.missing -= np.bincount(cells // self.num_slots, minlength=self._depth)

    def take(self, buffer: BatchBuffer) -> None:
        """Move the next step's samples to a buffer and free their cells; the lock is held."""
        place = self.next_step % self._depth
        cells = slice(place * self.num_slots, (place + 1) * self.num_slots)
        buffer.uid[:], buffer.epoch[:], buffer.label[:], buffer.shard[:] = self._whole[:, cells]
        buffer.weight[:] = self._weight[cells]
        buffer.tensors.keys = self._keys[cells]
        buffer.data = self._data[cells]
        self._data[cells] = [None] * self.num_slots
        self.missing[place] = self.num_slots
        self.next_step += 1
