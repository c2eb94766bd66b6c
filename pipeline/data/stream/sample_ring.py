"""A ring buffer of the next steps: fetched samples wait here, one cell per slot.

    fetched runs, in any sequence --fill--> cells --take--> the batch buffer of the next step

Only `missing` needs the engine's lock: each cell is written once, by one thread.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import Run
from pipeline.data.order.mixture import Mixture
from pipeline.data.stream.batch import BatchBuffer
from pipeline.data.stream.fetch import FetchedSamples

Ints = NDArray[np.int64]


class FetchRequest(NamedTuple):
    """A window of a lane to fetch, for the step at which its first sample is due."""

    step: int
    source: int  # the data set's number
    lane_slot: int
    run: Run


class SampleRing:
    """The next steps of a rank: which runs to request, which cells they fill, what is ready."""

    def __init__(
        self,
        order: Mixture,
        *,
        first_step: int,
        stop_step: int | None,
        rank: int,
        world: int,
        num_buffers: int = 1,
        num_draws: int = 0,
    ) -> None:
        """`num_buffers`: steps that may be decoded at a time, with their samples still in memory.
        `num_draws`: random numbers per sample, for its augmentation.
        """
        self._order = order
        self.num_slots = order.batch_size // world
        self._first_slot = rank * self.num_slots
        self.next_step = first_step
        self.stop_step = stop_step
        self._next_turn = {
            (source, lane): order.first_turn(source, lane, first_step)
            for source in range(len(order.orders))
            for lane in self._lane_slots(source)
        }
        # Request one window ahead of the one being decoded, so that no lane holds more than two,
        # but at least two steps ahead, for steps as long as a window.
        self._turns_ahead: list[int] = []
        for source, one in enumerate(order.orders):
            turns_per_step = -(-order.most_per_step(source) // one.lanes)
            ahead = max(one.window_size - num_buffers * turns_per_step, 2 * turns_per_step)
            self._turns_ahead.append(ahead)
        self._depth = max(self._steps_held(source) for source in range(len(order.orders)))
        self.missing = np.full(self._depth, self.num_slots)
        num_cells = self._depth * self.num_slots
        self._read_buffers = np.full(num_cells, None, object)
        self._whole = np.zeros((5, num_cells), np.int64)  # uid, epoch, label, start, stop
        self._weight = np.zeros(num_cells, np.float32)
        self._crc32 = np.full(num_cells, -1, np.int64)
        self._draws = np.zeros((num_cells, num_draws), np.float32)

    def _lane_slots(self, source: int) -> range:
        """The lane slots that may contain slots of this rank; superfluous ones cost little."""
        order = self._order.orders[source]
        if len(self._order.orders) > 1:
            return range(order.lanes)
        share = order.lane_share
        last_slot = self._first_slot + self.num_slots - 1
        return range(self._first_slot // share, last_slot // share + 1)

    def _steps_held(self, source: int) -> int:
        """Upper bound on the steps that the requested windows can span."""
        order = self._order.orders[source]
        turns = self._turns_ahead[source] + order.window_size + 3
        last = self._order.steps_of(source, np.array([turns * order.lanes]))
        return int(last[0]) + 3

    @property
    def is_done(self) -> bool:
        """Whether every step has been taken."""
        return self.stop_step is not None and self.next_step >= self.stop_step

    @property
    def is_ready(self) -> bool:
        """Whether all samples of the next step have arrived."""
        return not self.is_done and self.missing[self.next_step % self._depth] == 0

    def requests(self) -> list[FetchRequest]:
        """Return new requests, the earliest step first; each is returned once."""
        wanted: list[FetchRequest] = []
        limits = [self._limit(source) for source in range(len(self._order.orders))]
        for (source, lane_slot), turn in self._next_turn.items():
            if turn >= limits[source]:
                continue
            order = self._order.orders[source]
            stop = turn
            while stop < limits[source]:
                run = order.run_at(lane_slot, stop)
                position = np.array([stop * order.lanes + lane_slot])
                step = int(self._order.steps_of(source, position)[0])
                wanted.append(FetchRequest(step, source, lane_slot, run))
                stop = run.next_turn
            self._next_turn[source, lane_slot] = stop
        wanted.sort(key=lambda request: (request.step, request.source, request.lane_slot))
        return wanted

    def _limit(self, source: int) -> int:
        """The first turn of a data set that may not be requested yet."""
        limit = self._order.first_turn(source, 0, self.next_step) + self._turns_ahead[source]
        if self.stop_step is not None:
            limit = min(limit, self._order.first_turn(source, 0, self.stop_step))
        return limit

    def cells_of(self, request: FetchRequest) -> tuple[Ints, Ints]:
        """(positions in the run's window, cells) of the samples that this rank delivers."""
        run = request.run
        turns = np.arange(run.turn, run.next_turn)
        lanes = self._order.orders[request.source].lanes
        step, slot = self._order.slots(request.source, turns * lanes + request.lane_slot)
        slot -= self._first_slot
        ours = (slot >= 0) & (slot < self.num_slots)
        if self.stop_step is not None:
            ours &= step < self.stop_step
        cells = (step % self._depth) * self.num_slots + slot
        return (turns - run.turn + run.start)[ours], cells[ours]

    def fill(self, run: Run, cells: Ints, samples: FetchedSamples) -> None:
        """Put fetched samples into their cells; call `arrived` afterwards."""
        self._read_buffers[cells] = samples.read_buffers
        for row, values in enumerate((samples.uid, run.epoch, samples.label)):
            self._whole[row, cells] = values
        self._whole[3, cells] = samples.start
        self._whole[4, cells] = samples.stop
        self._crc32[cells] = samples.crc32
        self._weight[cells] = 0 if run.repeated else 1
        self._draws[cells] = samples.draws

    def arrived(self, cells: Ints) -> None:
        """Count filled cells; the caller holds the lock."""
        self.missing -= np.bincount(cells // self.num_slots, minlength=self._depth)

    def take(self, buffer: BatchBuffer) -> None:
        """Move the next step's samples to a buffer and free its cells; needs the lock."""
        row = self.next_step % self._depth
        cells = slice(row * self.num_slots, (row + 1) * self.num_slots)
        buffer.uid[:], buffer.epoch[:], buffer.label[:], start, stop = self._whole[:, cells]
        buffer.weight[:] = self._weight[cells]
        buffer.read_buffers = self._read_buffers[cells].tolist()
        buffer.starts, buffer.stops = start.tolist(), stop.tolist()
        buffer.crc32 = self._crc32[cells].tolist()
        buffer.draws = self._draws[cells].copy()
        self._read_buffers[cells] = None
        self.missing[row] = self.num_slots
        self.next_step += 1
