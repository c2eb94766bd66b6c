"""The data stream of a training run: one Batch per step, the same on any machine.

    DataConfig + Index + seed + G -> Order -> Board -> Engine (threads) -> Stream -> Batch

Memory: at most two windows of encoded samples per lane that the rank reads, and `prefetch` + 1
decoded batches. The state of the stream is its step number.
"""

import logging
import math
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Self

from pipeline.data.batch import Batch, BatchBuffer
from pipeline.data.board import Board
from pipeline.data.engine import Engine
from pipeline.data.fetch import Fetcher
from pipeline.data.index import Index
from pipeline.data.order import Order, Tail
from pipeline.data.settings import DataConfig
from pipeline.data.storage import Storage, open_storage
from pipeline.errors import UserError

MAX_READ_AMPLIFICATION = 1.1

log = logging.getLogger(__name__)


class Quarantined(NamedTuple):
    """A sample that was replaced by a tombstone."""

    uid: int
    key: str
    shard: str
    stage: str
    reason: str


@dataclass
class StreamCounters:
    """What a stream has delivered and spent since it was opened."""

    batches: int = 0
    images: int = 0  # slots delivered, tombstones and repeats included
    tombstones: int = 0
    stall_seconds: float = 0.0  # in next(), waiting for data
    bytes_read: int = 0
    reads: int = 0
    retries: int = 0  # local files are read without


def order_of(data: DataConfig, index: Index, seed: int, batch_size: int, tail: Tail) -> Order:
    """Build the order of a config's split; raise UserError on numbers that do not fit."""
    return Order(
        index.counts(data.split),
        seed=seed,
        batch_size=batch_size,
        lanes=data.lanes,
        interleave=data.interleave,
        window=data.window,
        tail=tail,
        dataset_id=index.dataset_id,
        split=index.split_identity(data.split),
    )


def read_amplification(lanes: int, world: int) -> float:
    """How often a shard's bytes are read on average: lanes at the border of two ranks twice."""
    return (lanes + world - math.gcd(lanes, world)) / lanes


def open_stream(
    data: DataConfig,
    *,
    index: Index,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    num_steps: int | None = None,
    rank: int = 0,
    world: int = 1,
    tail: Tail = "carry",
    pin: bool = False,
) -> "Stream":
    """Open the stream of `rank` of `world` from `first_step` on.

    `num_steps`: None = endless; under the tail `mask`, to the end of the epoch. Raises UserError
    before any thread starts, if the numbers do not fit or the shards are not those of the index.
    """
    order = order_of(data, index, seed, batch_size, tail)
    if batch_size % world:
        near = sorted({max(1, batch_size // world) * world, (batch_size // world + 1) * world})
        raise UserError(
            f"The global batch of {batch_size} does not divide over {world} processes: choose "
            f"{' or '.join(map(str, near))}, or another number of processes."
        )
    index.check_shards(data.shards_root)
    _warn_of_amplification(order.lanes, rank, world)
    stop_step = None if num_steps is None else first_step + num_steps
    if stop_step is None and tail == "mask":
        steps_per_epoch = order.epoch_length // batch_size
        stop_step = (first_step // steps_per_epoch + 1) * steps_per_epoch
    board = Board(order, first_step=first_step, stop_step=stop_step, rank=rank, world=world)
    storage = open_storage(data.shards_root)
    fetcher = Fetcher(index, storage, order, split=data.split, suffixes=data.decode.member_suffixes)
    engine = Engine(
        board,
        fetcher,
        data.decode,
        decode_threads=data.threads,
        read_threads=data.read_threads,
        prefetch=data.prefetch,
        pin=pin,
    )
    return Stream(engine, storage, order, index)


def _warn_of_amplification(lanes: int, rank: int, world: int) -> None:
    amplification = read_amplification(lanes, world)
    if rank == 0 and amplification > MAX_READ_AMPLIFICATION:
        log.warning(
            "data.lanes = %d over %d processes reads every byte %.2f times; a multiple of %d "
            "lanes that divides the global batch reads it once",
            lanes,
            world,
            amplification,
            world,
        )


class Stream(Iterator[Batch]):
    """Batches of one rank, one per step; close it, or use it in a `with` statement."""

    def __init__(self, engine: Engine, storage: Storage, order: Order, index: Index) -> None:
        self.order = order
        self.counters = StreamCounters()
        self._engine = engine
        self._shards = index.shards
        self._quarantined: list[Quarantined] = []
        self._close = weakref.finalize(self, _stop, engine, storage)
        engine.start()

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
        """Wait for the next step's batch; what a thread of the stream met is raised and ends it.

        Bad samples raise nothing here: too many of them is a decision for all processes together,
        which `pipeline.quarantine` takes.
        """
        started = time.perf_counter()
        try:
            buffer = self._engine.take()
        except BaseException:
            # The error's traceback leads to this stream, so the collector would never end it.
            self.close()
            raise
        counters = self.counters
        counters.stall_seconds += time.perf_counter() - started
        counters.bytes_read = self._engine.reads.num_bytes
        counters.reads = self._engine.reads.num_reads
        if buffer is None:
            self.close()
            raise StopIteration
        counters.batches += 1
        counters.images += len(buffer.slots)
        if buffer.faults:
            self._bury(buffer)
        return replace(buffer.tensors)

    def take_quarantined(self) -> list[Quarantined]:
        """Return the samples buried since the last call, in the order of their slots."""
        taken, self._quarantined = self._quarantined, []
        return taken

    def close(self) -> None:
        """Stop the threads and wait for them; closing twice does nothing."""
        self._close()

    def _bury(self, buffer: BatchBuffer) -> None:
        """Turn faults into tombstones: the slot stays, black and at weight 0."""
        for fault in sorted(buffer.faults):
            slot = fault.slot
            buffer.x[slot].zero_()
            if buffer.weight[slot] == 0:
                continue  # a repeat that fills a masked batch: its original was counted
            buffer.weight[slot] = 0
            self.counters.tombstones += 1
            shard = self._shards[int(buffer.shard[slot])].name
            key = buffer.tensors.keys[slot]
            self._quarantined.append(
                Quarantined(int(buffer.uid[slot]), key, shard, fault.stage, fault.reason)
            )


def _stop(engine: Engine, storage: Storage) -> None:
    if engine.owns_current_thread():
        # The garbage collector came by in a thread of the stream, which may hold a lock that the
        # others need in order to end.
        threading.Thread(target=_stop, args=(engine, storage), name="stream-stop").start()
        return
    engine.stop()
    storage.close()
