"""The data stream of a training run: one Batch per step, the same on any machine.

    DataConfig + Index + seed + G -> Order -> Board -> Engine (threads) -> Stream -> Batch

Memory: at most two windows of encoded samples per lane that the rank reads, and `prefetch` + 1
decoded batches. The state of the stream is its step number.
"""

import logging
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self

from pipeline.data.account import Account
from pipeline.data.augmentations import Augmenter
from pipeline.data.batch import Batch, BatchBuffer, new_buffer
from pipeline.data.board import Board
from pipeline.data.counters import StreamCounters
from pipeline.data.decode import ArrayDecode, ImageDecode
from pipeline.data.engine import DecodeSlot, Engine
from pipeline.data.fetch import Fetcher
from pipeline.data.index import Index
from pipeline.data.mixture import Mixture, lanes_of_parts
from pipeline.data.names import SampleNames
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


Indexes = Index | Sequence[Index]  # of the one data set, or one for each of a mixture


def open_indexes(data: DataConfig) -> tuple[Index, ...]:
    """Open the index of every data set that a config names; raise UserError."""
    return tuple(Index.open(source.path, n) for n, source in enumerate(data.sources))


def order_of(
    data: DataConfig, indexes: Indexes, seed: int, batch_size: int, tail: Tail = "carry"
) -> Mixture:
    """Build the order of a config's data; raise UserError on numbers that do not fit."""
    indexes = [indexes] if isinstance(indexes, Index) else indexes
    weights = [source.weight for source in data.sources]
    is_alone = len(indexes) == 1
    if not is_alone and tail != "carry":
        raise ValueError("only an endless stream can be mixed: read one data set at a time")
    orders: list[Order] = []
    lanes = lanes_of_parts(batch_size, data.lanes, weights)
    for index, part_lanes in zip(indexes, lanes, strict=True):
        order = Order(
            index.counts(data.split),
            seed=seed,
            # A part of a mixture has no batches of its own; its quotas are the mixture's.
            batch_size=batch_size if is_alone else part_lanes or 1,
            lanes=part_lanes,
            interleave=data.interleave,
            window=data.window,
            tail=tail,
            dataset_id=index.dataset_id,
            split=index.split_identity(data.split),
        )
        orders.append(order)
    return Mixture(orders, weights, batch_size)


def read_amplification(lanes: int, world: int) -> float:
    """How often a shard's bytes are read on average: lanes at the border of two ranks twice."""
    return (lanes + world - math.gcd(lanes, world)) / lanes


def open_stream(
    data: DataConfig,
    *,
    index: Indexes,
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

    `index`: of the data set; of a mixture, one for each. `num_steps`: None = endless; under the
    tail `mask`, to the end of the epoch. Raises UserError before any thread starts, if the numbers
    do not fit or the shards are not those of the index.
    """
    indexes = [index] if isinstance(index, Index) else list(index)
    order = order_of(data, indexes, seed, batch_size, tail)
    if batch_size % world:
        near = sorted({max(1, batch_size // world) * world, (batch_size // world + 1) * world})
        raise UserError(
            f"The global batch of {batch_size} does not divide over {world} processes: choose "
            f"{' or '.join(map(str, near))}, or another number of processes."
        )
    storages = [open_storage(source.root, data.remote) for source in data.sources]
    for source, storage, one in zip(data.sources, storages, indexes, strict=True):
        one.check_shards(storage)
        if data.verify_checksums and not one.has_checksums:
            raise UserError(
                f"data.verify_checksums: the index of {source.path} holds no checksums; run "
                f"`latentmill index --deep {source.root}`."
            )
    for one in order.orders:
        _warn_of_amplification(one.lanes, rank, world)
    stop_step = None if num_steps is None else first_step + num_steps
    if stop_step is None and tail == "mask":
        steps_per_epoch = order.orders[0].epoch_length // batch_size
        stop_step = (first_step // steps_per_epoch + 1) * steps_per_epoch
    augmenter = Augmenter(data.augmentations, seed, size=data.decode.event_shape[-1])
    board = Board(
        order,
        first_step=first_step,
        stop_step=stop_step,
        rank=rank,
        world=world,
        num_draws=augmenter.num_draws,
    )
    fetchers = [
        Fetcher(
            one,
            storage,
            part,
            split=data.split,
            suffixes=data.decode.member_suffixes,
            draw=augmenter.draw,
            verify_checksums=data.verify_checksums,
        )
        for one, storage, part in zip(indexes, storages, order.orders, strict=True)
    ]
    names = SampleNames(indexes)
    engine = Engine(
        board,
        fetchers,
        slot_decoder(data.decode, augmenter),
        [
            new_buffer(data.decode, board.num_slots, names.keys, pin=pin)
            for _ in range(data.prefetch + 1)
        ],
        decode_threads=data.threads,
        read_threads=data.num_read_threads,
    )
    account = Account(first_step, rank * board.num_slots)
    return Stream(engine, storages, order, names, account)


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


def slot_decoder(decode: ImageDecode | ArrayDecode, augmenter: Augmenter) -> DecodeSlot:
    """Return what turns a member's bytes into a slot of a buffer."""
    if augmenter.num_draws and isinstance(decode, ImageDecode):
        decode_view = decode.decode_view

        def decode_augmented(buffer: BatchBuffer, slot: int, content: bytes) -> None:
            decode_view(content, buffer.slots[slot], augmenter.view_of(buffer.draws[slot]))

        return decode_augmented
    decode_whole = decode.decode

    def decode_plain(buffer: BatchBuffer, slot: int, content: bytes) -> None:
        decode_whole(content, buffer.slots[slot])

    return decode_plain


class Stream(Iterator[Batch]):
    """Batches of one rank, one per step; close it, or use it in a `with` statement."""

    def __init__(
        self,
        engine: Engine,
        storages: Sequence[Storage],
        order: Mixture,
        names: SampleNames,
        account: Account,
    ) -> None:
        self.order = order
        self.account = account
        self._engine = engine
        self._storages = storages
        self._names = names
        self._quarantined: list[Quarantined] = []
        self._close = weakref.finalize(self, _stop, engine, storages)
        engine.start()

    @property
    def counters(self) -> StreamCounters:
        """What was delivered and spent so far."""
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
        """Wait for the next step's batch; what a thread of the stream met is raised and ends it.

        Bad samples raise nothing here: too many of them is a decision for all processes together,
        which `pipeline.quarantine` takes.
        """
        try:
            buffer = self._engine.take()
        except BaseException:
            # The error's traceback leads to this stream, so the collector would never end it.
            self.close()
            raise
        if buffer is None:
            self.close()
            raise StopIteration
        if buffer.faults:
            self._bury(buffer)
        self.account.add(buffer)
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
            self._engine.counters.tombstones += 1
            uid = int(buffer.uid[slot])
            key, shard = self._names.place(uid)
            self._quarantined.append(Quarantined(uid, key, shard, fault.stage, fault.reason))


def _stop(engine: Engine, storages: Sequence[Storage]) -> None:
    if engine.owns_current_thread():
        # The garbage collector came by in a thread of the stream, which may hold a lock that the
        # others need in order to end.
        threading.Thread(target=_stop, args=(engine, storages), name="stream-stop").start()
        return
    for storage in storages:
        storage.close()  # ends what waits for a server
    engine.stop()
    for storage in storages:
        storage.close()
