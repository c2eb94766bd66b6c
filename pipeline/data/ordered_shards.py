"""The order of training as the first stage of a webdataset pipeline: raw samples, resumable.

    source = OrderedShards("shards-{000..127}.tar", batch_size=256)
    wds.DataPipeline(source, wds.decode("rgb8"), wds.to_tuple("jpg", "cls"), wds.batched(256))
    source.state_dict() -> {T, order_id, dataset_id, ...} -> source.load_state_dict(state)

The samples are those of `open_stream` under the same numbers, in the order of its slots.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.common.errors import UserError
from pipeline.data.index import Index
from pipeline.data.index.splits import ALL
from pipeline.data.order import Order
from pipeline.data.order.slots import RankSlots
from pipeline.data.raw_samples import Sample, raw_samples
from pipeline.data.storage import RemotePolicy, open_storage
from pipeline.data.storage.patterns import FoundShards, find_shards

MIN_READ_THREADS = 2

State = dict[str, Any]


class _StreamPosition(NamedTuple):
    """State of a rank: positions below T are done, and `taken` of its slots in the step of T."""

    T: int
    taken: int


class OrderedShards(IterableDataset[Sample]):
    """An iterable of raw samples in the order of `order-v1`, for a DataPipeline or DataLoader.

    Each rank gets its slots of every global batch, so wds.batched(batch_size // world) gives the
    batches of `open_stream`. A new iteration continues where the last one stopped. A DataLoader may
    have 0 or 1 workers: every worker would read all bytes of the rank.
    """

    def __init__(
        self,
        shards: str | Path,
        *,
        batch_size: int,
        index: str | Path | None = None,
        split: str = ALL,
        seed: int = 0,
        lanes: int | None = None,
        interleave: int = 8,
        window: int = 256,
        rank: int | None = None,
        world: int | None = None,
        epochs: int | None = None,
        tail: Literal["carry", "drop"] = "carry",
        read_threads: int | None = None,
        remote: RemotePolicy | None = None,
    ) -> None:
        """Check everything; raise UserError if the numbers or the shards do not fit.

        shards: directory, URL, glob or brace pattern; index: the directory or URL that holds
        `index/`, None = beside the shards; batch_size: samples per step over all ranks. epochs:
        length of the whole stream, None = endless. tail: under `carry` each sample comes exactly
        once per epoch, and at the end of the last epoch some ranks get fewer samples; `drop` leaves
        out the incomplete batch, and all ranks get the same number. read_threads: None = 2
        on a disk of this machine, 8 on a network file system, `remote.connections` behind a URL.
        """
        super().__init__()
        self._found = find_shards(shards, remote)
        self._remote = remote
        self._index_path = self._found.root if index is None else index
        self._split = split
        self._read_threads = read_threads
        self._numbers: dict[str, Any] = {
            "seed": seed,
            "batch_size": batch_size,
            "lanes": lanes,
            "interleave": interleave,
            "window": window,
            "tail": tail,
        }
        rank, world = _ranks(rank, world, batch_size)
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs = {epochs}, but must be at least 1 (or None: endless).")
        opened = Index.open(self._index_path)
        _check_names(self._found, opened, shards)
        opened.check_shards(open_storage(self._found.root, remote))
        self._ranks = (rank, world)
        order = self.order  # created here, so that its errors are raised here
        self._end = None if epochs is None else epochs * order.epoch_length
        self._start = _StreamPosition(0, 0)
        self._num_yielded = 0
        self._current = object()  # the iteration that is valid
        # In shared memory, so that the main process sees an iteration in a DataLoader's worker.
        self._runs_in_worker = torch.zeros((), dtype=torch.bool).share_memory_()
        self._has_begun_in_worker = False  # in this process, if it is a worker

    @cached_property
    def order(self) -> Order:
        """The order of the samples."""
        index = Index.open(self._index_path)
        return Order(
            index.counts(self._split),
            dataset_id=index.dataset_id,
            split=index.split_identity(self._split),
            **self._numbers,
        )

    def state_dict(self, *, consumed: int | None = None) -> State:
        """The state after `consumed` samples of this rank since the start, or since it was loaded.

        None: after the samples that were yielded so far. Later stages often hold samples that the
        loop has not seen (wds.batched one sample, a shuffle its buffer, a DataLoader's worker what
        it prefetches), and those would be lost: count the samples that the loop has used and pass
        their number. Raises UserError where only the loop can know it.
        """
        if consumed is None:
            if self._runs_in_worker.item() and get_worker_info() is None:
                raise UserError(
                    "The samples are read in a DataLoader's worker, ahead of the loop: save "
                    "state_dict(consumed=N), N being the samples of this rank that the loop has "
                    "used since the start or since load_state_dict."
                )
            consumed = self._num_yielded
        position = self._position_after(consumed)
        numbers = {"batch_size": self.order.batch_size, "world": self._ranks[1]}
        return {"T": position.T, "taken": position.taken} | self._identity() | numbers

    def load_state_dict(self, state: State) -> None:
        """Continue from a state: on any number of ranks if it lies between steps; else UserError.

        A run's data state {T, order_id, dataset_id} is accepted. It takes effect when the next
        iteration begins; a running iteration ends.
        """
        size, world = self.order.batch_size, self._ranks[1]
        defaults = {"tail": "carry", "taken": 0, "batch_size": size, "world": world}
        state = defaults | state
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise UserError(
                    f"The state is of another stream: its {name} is {state.get(name)}, here it is "
                    f"{ours}. T means the same sample only under the same shards, split, seed, "
                    "lanes, interleave, window and tail."
                )
        T, then, now = state["T"], (state["batch_size"], state["world"]), (size, world)
        if state["taken"] and then != now:
            raise UserError(
                f"The state lies within a step of (batch_size, world) = {then}, here they are "
                f"{now}: other numbers can continue only between steps. Save after a multiple of "
                f"{then[0] // then[1]} samples per rank."
            )
        if T % size and T % self.order.epoch_length:
            raise UserError(
                f"The state's T = {T} is no multiple of batch_size = {size}, by which the steps "
                f"are cut; it was saved with batch_size = {then[0]}."
            )
        self._start, self._num_yielded = _StreamPosition(T, state["taken"]), 0
        self._current = object()
        self._runs_in_worker.fill_(False)

    def __iter__(self) -> Iterator[Sample]:
        """Yield dicts: `__key__`, `__url__`, bytes by suffix, and `__local_path__` of a file."""
        self._current = object()
        return self._samples(self._current, self._position_after(self._num_yielded))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the order: a spawned worker creates its own."""
        return {name: value for name, value in self.__dict__.items() if name != "order"}

    def _samples(self, current: object, position: _StreamPosition) -> Iterator[Sample]:
        self._enter_worker()
        storage = open_storage(self._found.root, self._remote)
        threads = self._read_threads or max(storage.num_readers, MIN_READ_THREADS)
        samples = raw_samples(
            Index.open(self._index_path),
            self._slots(position.T),
            storage=storage,
            split=self._split,
            threads=threads,
        )
        for number, sample in enumerate(samples):
            if number < position.taken:
                continue
            if self._current is not current:
                raise RuntimeError("this iteration ended when another began or a state was loaded")
            self._num_yielded += 1
            yield sample

    def _enter_worker(self) -> None:
        """Raise UserError in one of several workers; note a single worker for the main process."""
        worker = get_worker_info()
        if worker is None:
            return
        if worker.num_workers > 1:
            raise UserError(
                f"DataLoader(num_workers={worker.num_workers}): every worker would read all "
                "bytes of this rank. Take 0 or 1; reading has threads of its own "
                "(read_threads), and decoding scales with the ranks."
            )
        if self._has_begun_in_worker:
            raise UserError(
                "DataLoader(persistent_workers=True) would skip the samples that its worker has "
                "prefetched: leave persistent_workers out."
            )
        self._has_begun_in_worker = True
        self._runs_in_worker.fill_(True)

    def _slots(self, start: int) -> RankSlots:
        return RankSlots(self.order, *self._ranks, start, self._end)

    def _identity(self) -> State:
        order = self.order
        return {"order_id": order.order_id, "dataset_id": order.dataset_id, "tail": order.tail}

    def _position_after(self, num: int) -> _StreamPosition:
        """The state of this rank `num` samples after the start."""
        slots, size = self._slots(self._start.T), self.order.batch_size
        start, step, rest = self._start.T, slots.first_step, self._start.taken + num
        in_first = len(slots.positions(step))
        if rest >= in_first:
            steps, rest = divmod(rest - in_first, slots.num_per_step)
            step += 1 + steps
            start = step * size
        if self._end is None:
            return _StreamPosition(start, rest)
        if start >= self._end or (slots.is_over(step + 1) and rest >= len(slots.positions(step))):
            return _StreamPosition(self._end, 0)
        return _StreamPosition(start, rest)


def _ranks(rank: int | None, world: int | None, batch_size: int) -> tuple[int, int]:
    """Return rank and world, checked; required where there are several processes."""
    if rank is None and world is None:
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise UserError(
                f"This is one of WORLD_SIZE = {processes} processes, and each would read "
                "everything: give OrderedShards(..., rank=, world=)."
            )
        rank, world = 0, 1
    if rank is None or world is None or not 0 <= rank < world:
        raise UserError(f"rank = {rank}, world = {world}: give both, with 0 <= rank < world.")
    if batch_size < 1 or batch_size % world:
        raise UserError(f"batch_size = {batch_size} does not divide over world = {world} ranks.")
    return rank, world


def _check_names(found: FoundShards, index: Index, shards: str | Path) -> None:
    indexed = {shard.name for shard in index.shards}
    if indexed == set(found.names):
        return
    more, less = sorted(set(found.names) - indexed), sorted(indexed - set(found.names))
    raise UserError(
        f"{shards} names {len(found.names)} shards, the index in {index.path} has {len(indexed)}: "
        f"not indexed are {more[:3] or 'none'}, not named are {less[:3] or 'none'}. Name the same "
        f"shards, or run `latentmill index '{shards}' --out DIR` and give index=DIR."
    )
