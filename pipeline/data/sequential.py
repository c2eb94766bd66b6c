"""Sequential reading for the export: every row of a split once, in shard order.

    shards -> rows of the split -> fixed batches -> threads decode READ_AHEAD batches -> RowBatch

A sample that cannot be decoded is an invalid row; a shard that cannot be read is an error. The
difference matters: an export stores an invalid row for good, but retries after an error.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.common.labels import NO_LABEL
from pipeline.common.texts import from_bytes
from pipeline.data.decode import ArrayDecode, DecodeError, ImageDecode, missing_member
from pipeline.data.index import Index
from pipeline.data.index.contents import LABEL_SUFFIX
from pipeline.data.index.members import read_members
from pipeline.data.settings import DataConfig
from pipeline.data.storage import ShardReadError, Storage, open_storage

METADATA_SUFFIXES = ("json",)
TEXT_SUFFIXES = ("txt",)

READ_AHEAD = 2  # batches

Ints = NDArray[np.int64]


class RowFault(NamedTuple):
    """A row that could not be decoded: its number in the shard, its key, and why."""

    row: int
    key: str
    stage: str
    reason: str


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one shard, padded with zeros to the full batch size.

    x: [batch_size, *event] in the stored dtype (images in channels-last memory); the first
    `num_rows` are real. rows: row numbers in the shard; valid: False where decoding failed (that x
    is zero); labels: -1 = none; metadata, texts: of the `.json` and the `.txt` member, None = none;
    label_texts: of the `.cls` members that the labels cannot hold, by place in the batch. Bytes
    that are no UTF-8 stay in the texts, see `pipeline.common.texts`.
    """

    x: Tensor
    num_rows: int
    rows: Ints
    keys: list[str]
    valid: NDArray[np.bool_]
    faults: list[RowFault]
    labels: Ints
    metadata: list[str | None]
    texts: list[str | None]
    label_texts: dict[int, str] = field(default_factory=dict[int, str])


def read_shards(
    data: DataConfig, index: Index, shards: Iterable[int], batch_size: int, *, pin: bool = False
) -> Generator[tuple[int, Iterator[RowBatch]]]:
    """Yield each shard's number and its rows of `data.split`, in batches of fixed boundaries.

    The next batches, also those of the next shard, are read and decoded in the background; `shards`
    is consumed one number at a time, shortly before it is needed. The iterator of a missing or
    changed shard raises UserError or ShardReadError, and reading continues with the next shard.
    Exhaust or abandon a shard's iterator before asking for the next. Empty shards are skipped. The
    caller closes the generator (`contextlib.closing`), which ends its threads.

    pin: put batches into page-locked memory, for asynchronous copies to a GPU.
    """
    ahead = _ReadAhead(data, index, iter(shards), batch_size, pin)
    try:
        for visit, jobs in groupby(_in_advance(ahead.jobs(), READ_AHEAD), lambda job: job[0]):
            yield visit[1], (future.result() for _, future in jobs)
            ahead.left = visit
    finally:
        ahead.close()


Visit = tuple[int, int]  # serial number, shard
Job = tuple[Visit, "Future[RowBatch]"]


def _in_advance(jobs: Iterator[Job], count: int) -> Iterator[Job]:
    """Yield the jobs in order, with `count` further ones already started."""
    begun: deque[Job] = deque()
    for job in jobs:
        begun.append(job)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


class _ReadAhead:
    """The threads that read and decode, kept for all shards; the next shard is opened early."""

    def __init__(
        self, data: DataConfig, index: Index, shards: Iterator[int], batch_size: int, pin: bool
    ) -> None:
        self._data, self._index, self._batch_size, self._pin = data, index, batch_size, pin
        self.left: Visit | None = None  # the shard that the caller has finished or abandoned
        self._shards = enumerate(shards)
        self._storage = open_storage(data.sources[0].root, data.remote)
        self._decoders = ThreadPoolExecutor(data.threads, thread_name_prefix="rows-decode")
        self._readers = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="rows-read")

    def jobs(self) -> Iterator[Job]:
        """Submit the batches of all shards, one shard after the other."""
        following = self._open_next()
        while following is not None:
            (visit, opening), following = following, self._open_next()
            try:
                starts = range(0, len(opening.result().rows), self._batch_size)
            except Exception:  # noqa: BLE001 - raised by the shard's iterator
                starts = range(1)
            for start in starts:
                if visit == self.left:
                    break
                yield visit, self._readers.submit(self._read, opening, start)

    def close(self) -> None:
        """Stop the threads; pending work is cancelled."""
        self._storage.close()
        for pool in (self._readers, self._decoders):
            pool.shutdown(wait=True, cancel_futures=True)
        self._storage.close()

    def _open_next(self) -> "tuple[Visit, Future[ShardRowReader]] | None":
        visit = next(self._shards, None)
        return None if visit is None else (visit, self._readers.submit(self._open, visit[1]))

    def _read(self, opening: "Future[ShardRowReader]", start: int) -> RowBatch:
        return opening.result().batch(start, self._decoders)

    def _open(self, shard: int) -> "ShardRowReader":
        entry = self._index.shards[shard]
        try:
            state = self._storage.states([entry.name])[entry.name]
        except UserError as error:  # it was readable when the export started
            raise ShardReadError(f"{error}") from error
        if state is None or state.num_bytes != entry.bytes:
            raise ShardReadError(
                f"{self._storage.where(entry.name)} is missing or has changed since it was "
                "indexed: put it back, or run `latentmill index` and a new export."
            )
        size, pin = self._batch_size, self._pin
        return ShardRowReader(self._data, self._index, shard, size, self._storage, pin=pin)


class ShardRowReader:
    """Reads and decodes batches of one shard; `rows`: row numbers of the split."""

    def __init__(
        self,
        data: DataConfig,
        index: Index,
        shard: int,
        batch_size: int,
        storage: Storage,
        *,
        pin: bool = False,
    ) -> None:
        """Read the index's table of the shard; pin: see `read_shards`."""
        self._pin = pin
        self._decode: ImageDecode | ArrayDecode = data.decode
        self._threads = data.threads
        self._batch_size = batch_size
        self._storage = storage
        self._name = index.shards[shard].name
        self._table = index.table(shard)
        self.rows = self._table.rows_of(index.split_number(data.split))
        suffixes = (tuple(data.decode.member_suffixes), METADATA_SUFFIXES, TEXT_SUFFIXES)
        self._ranges = [self._table.ranges_of(names) for names in suffixes]
        # Read where the table could not keep the label, or where it is -1.
        labels = self._table.ranges_of((LABEL_SUFFIX,))
        offset = np.where(self._table.labels == NO_LABEL, labels.offset, -1)
        self._ranges.append(replace(labels, offset=offset))

    def read(self, start: int) -> tuple[Ints, list[list[bytes | None]]]:
        """Return the numbers of a batch's rows, and the bytes: pictures, JSON, texts, labels."""
        rows = self.rows[start : start + self._batch_size]
        return rows, read_members(self._storage, self._name, self._ranges, rows)

    def decode(
        self, contents: list[bytes | None], decoders: ThreadPoolExecutor
    ) -> tuple[Tensor, dict[int, DecodeError]]:
        """Return the buffer of a batch, and the errors by row of the batch."""
        stored = getattr(torch, self._decode.stored_dtype.name)
        shape = (self._batch_size, *self._decode.buffer_shape)
        x = torch.zeros(shape, dtype=stored, pin_memory=self._pin)
        return x, self._decode_all(contents, list(x.numpy()), decoders)

    def batch(self, start: int, decoders: ThreadPoolExecutor) -> RowBatch:
        """Read and decode the batch that begins with the split's row `start`."""
        rows, (contents, metadata, texts, labels) = self.read(start)
        keys = self._table.keys(rows)
        x, faults = self.decode(contents, decoders)
        valid = np.ones(len(rows), np.bool_)
        valid[list(faults)] = False
        return RowBatch(
            x=self._decode.event_view(x),
            num_rows=len(rows),
            rows=rows,
            keys=keys,
            valid=valid,
            faults=[
                RowFault(int(rows[i]), keys[i], error.stage, error.reason)
                for i, error in sorted(faults.items())
            ],
            labels=self._table.labels[rows],
            metadata=[_text(content) for content in metadata],
            texts=[_text(content) for content in texts],
            label_texts={i: from_bytes(text) for i, text in enumerate(labels) if text is not None},
        )

    def _decode_all(
        self,
        contents: list[bytes | None],
        slots: list[NDArray[Any]],
        decoders: ThreadPoolExecutor,
    ) -> dict[int, DecodeError]:
        """Decode each content into its slot; zero the slots of bad ones and return their errors."""
        faults: dict[int, DecodeError] = {}

        def decode_part(part: int) -> None:
            for i in range(part, len(contents), self._threads):
                content = contents[i]
                try:
                    if content is None:
                        raise missing_member()
                    self._decode.decode(content, slots[i])
                except DecodeError as error:
                    faults[i] = error
                    slots[i][...] = 0

        for future in [decoders.submit(decode_part, part) for part in range(self._threads)]:
            future.result()
        return faults


def _text(content: bytes | None) -> str | None:
    return None if content is None else from_bytes(content)
