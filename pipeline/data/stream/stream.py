"""The data stream of a training run: one Batch per step, the same on any machine.

    DataConfig + Index + Mixture -> DataSets -> SampleRing -> Engine (threads) -> Stream -> Batch

Memory: at most two windows of encoded samples per lane that the rank reads, and `prefetch` + 1
decoded batches. The state of the stream is its step number.
"""

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self

import torch

from pipeline.common.errors import UserError
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.order.mixture import Mixture, read_amplification
from pipeline.data.settings import DataConfig
from pipeline.data.stream.account import Account, StreamCounters
from pipeline.data.stream.batch import Batch, BatchBuffer, new_buffer
from pipeline.data.stream.datasets import DataSets
from pipeline.data.stream.engine import Engine
from pipeline.data.stream.sample_ring import SampleRing

MAX_READ_AMPLIFICATION = 1.1
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


class Quarantined(NamedTuple):
    """A bad sample, whose slot has weight 0."""

    uid: int
    key: str
    shard: str
    stage: str
    reason: str


def open_stream(
    data: DataConfig,
    indexes: Sequence[Index],
    order: Mixture,
    states: Sequence[States],
    *,
    first_step: int = 0,
    num_steps: int | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
) -> "Stream":
    """Open the stream of `rank` of `world` from `first_step` on.

    `indexes`, `order`, `states`: of `data`, by `open_indexes`, `order_of`, `check_shards`.
    `num_steps`: None = endless; under the tail `mask`, to the end of the epoch. `device`: device of
    the consumer. On a GPU memory is pinned, and the account lags one batch, because `DeviceBatches`
    copies one batch ahead. Raises UserError, before any thread starts, if the global batch does not
    divide over the ranks.
    """
    batch_size = order.batch_size
    if batch_size % world:
        near = sorted({max(1, batch_size // world) * world, (batch_size // world + 1) * world})
        raise UserError(
            f"The global batch of {batch_size} does not divide over {world} processes: choose "
            f"{' or '.join(map(str, near))}, or another number of processes."
        )
    sets = DataSets(data, indexes, order, states)
    if rank == 0:
        for part in order.orders:
            _warn_of_amplification(part.lanes, world)
    on_gpu = device.type == "cuda"
    ring = SampleRing(
        order,
        first_step=first_step,
        stop_step=_stop_step(order, first_step, num_steps),
        rank=rank,
        world=world,
        num_buffers=data.prefetch + 1,
        num_draws=sets.augmenter.num_draws,
    )
    engine = Engine(
        ring,
        sets.fetchers,
        sets.slot_decoder(),
        [
            new_buffer(data.decode, ring.num_slots, sets.names.keys, pin=on_gpu)
            for _ in range(data.prefetch + 1)
        ],
        decode_threads=data.threads,
        read_threads=sets.num_read_threads,
    )
    account = Account(first_step, rank * ring.num_slots, ahead=int(on_gpu))
    return Stream(engine, sets, account)


def _stop_step(order: Mixture, first_step: int, num_steps: int | None) -> int | None:
    if num_steps is not None:
        return first_step + num_steps
    if order.orders[0].tail != "mask":
        return None
    steps_per_epoch = order.orders[0].epoch_length // order.batch_size
    return (first_step // steps_per_epoch + 1) * steps_per_epoch


def _warn_of_amplification(lanes: int, world: int) -> None:
    amplification = read_amplification(lanes, world)
    if amplification > MAX_READ_AMPLIFICATION:
        log.warning(
            "data.lanes = %d over %d processes reads every byte %.2f times; a multiple of %d "
            "lanes that divides the global batch reads it once",
            lanes,
            world,
            amplification,
            world,
        )


class Stream(Iterator[Batch]):
    """Batches of one rank, one per step; close it, or use a `with` statement."""

    def __init__(self, engine: Engine, sets: DataSets, account: Account) -> None:
        self.order = sets.order
        self.account = account
        self._engine = engine
        self._storages = sets.storages
        self._names = sets.names
        self._quarantined: list[Quarantined] = []
        self._close = weakref.finalize(self, _stop, engine, sets)
        engine.start()

    @property
    def counters(self) -> StreamCounters:
        """Counters of what was delivered so far."""
        counters = self._engine.counters
        counters.retries = sum(storage.counters.num_retries for storage in self._storages)
        counters.reopened = sum(storage.counters.num_reopened for storage in self._storages)
        return counters

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Wait for the next step's batch; an error of any thread is raised here, ending the stream.

        Bad samples raise nothing here: `pipeline.monitoring.bad_samples` decides over all processes
        whether there are too many.
        """
        try:
            buffer = self._engine.take()
        except BaseException:
            # The traceback refers to this stream, so garbage collection would not close it.
            self.close()
            raise
        if buffer is None:
            self.account.settle()
            self.close()
            raise StopIteration
        if buffer.faults:
            self._mark_bad(buffer)
        else:
            self._engine.counters.bad_in_row = 0
        self.account.add(buffer)
        return replace(buffer.tensors)

    def take_quarantined(self) -> list[Quarantined]:
        """Return the bad samples since the last call, in slot order."""
        taken, self._quarantined = self._quarantined, []
        return taken

    def close(self) -> None:
        """Stop the threads and wait for them; closing twice does nothing."""
        self._close()

    def _mark_bad(self, buffer: BatchBuffer) -> None:
        """Set the slots of bad samples to zero and their weights to 0."""
        counters = self._engine.counters
        bad = {fault.slot for fault in buffer.faults}
        for slot in range(len(buffer.slots)):
            counters.bad_in_row = counters.bad_in_row + 1 if slot in bad else 0
            counters.max_bad_in_row = max(counters.max_bad_in_row, counters.bad_in_row)
        for fault in sorted(buffer.faults):
            slot = fault.slot
            buffer.x[slot].zero_()
            if buffer.weight[slot] == 0:
                continue  # a repeat that fills a masked batch: the sample itself was counted
            buffer.weight[slot] = 0
            counters.tombstones += 1
            uid = int(buffer.uid[slot])
            key, shard = self._names.key_and_shard(uid)
            self._quarantined.append(Quarantined(uid, key, shard, fault.stage, fault.reason))


def _stop(engine: Engine, sets: DataSets) -> None:
    if engine.owns_current_thread():
        # Garbage collection may run in a thread of the stream, which may hold a lock that the
        # other threads need in order to end.
        threading.Thread(target=_stop, args=(engine, sets), name="stream-stop").start()
        return
    sets.close()  # ends waiting requests
    engine.stop()
    sets.close()
