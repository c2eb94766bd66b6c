"""Sequential reading of one shard, for the export: every row of a split once, in shard order.

    shard -> rows of the split -> fixed batches -> threads decode one batch ahead -> RowBatch

A sample that cannot be decoded is an invalid row; a shard that cannot be read is an error. The two
are never mixed up, because an export would keep the first for good.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.decode import ArrayDecode, DecodeError, ImageDecode, missing_member
from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.data.storage import ShardReadError, Storage, open_storage
from pipeline.data.stream.fetch import read_members

METADATA_SUFFIXES = ("json",)
TEXT_SUFFIXES = ("txt",)

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
    bytes that are no UTF-8 become U+FFFD.
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


def shard_batches(
    data: DataConfig, index: Index, shard: int, batch_size: int
) -> Iterator[RowBatch]:
    """Yield the rows of one shard that belong to `data.split`, in batches of fixed boundaries.

    Raises UserError or ShardReadError if the shard is missing or is not what the index says.
    """
    storage = open_storage(data.sources[0].root, data.remote)
    reader = _ShardReader(data, index, shard, batch_size, storage)
    entry = index.shards[shard]
    state = storage.states([entry.name])[entry.name]
    if state is None or state.num_bytes != entry.bytes:
        raise ShardReadError(
            f"{storage.where(entry.name)} is missing or has changed since it was indexed: put it "
            "back, or run `latentmill index` and a new export."
        )
    decoders = ThreadPoolExecutor(data.threads, thread_name_prefix="rows-decode")
    ahead = ThreadPoolExecutor(1, thread_name_prefix="rows-batch")
    try:
        starts = range(0, len(reader.rows), batch_size)
        waiting: Future[RowBatch] | None = None
        for start in starts:
            following = ahead.submit(reader.batch, start, decoders)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
    finally:
        ahead.shutdown(wait=True, cancel_futures=True)
        decoders.shutdown(wait=True, cancel_futures=True)
        storage.close()


class _ShardReader:
    """Reads and decodes batches of one shard."""

    def __init__(
        self, data: DataConfig, index: Index, shard: int, batch_size: int, storage: Storage
    ) -> None:
        self._decode: ImageDecode | ArrayDecode = data.decode
        self._threads = data.threads
        self._batch_size = batch_size
        self._storage = storage
        self._name = index.shards[shard].name
        self._table = index.table(shard)
        self.rows = self._table.rows_of(index.split_number(data.split))
        suffixes = (tuple(data.decode.member_suffixes), METADATA_SUFFIXES, TEXT_SUFFIXES)
        self._ranges = [self._table.ranges_of(names) for names in suffixes]

    def batch(self, start: int, decoders: ThreadPoolExecutor) -> RowBatch:
        rows = self.rows[start : start + self._batch_size]
        contents, metadata, texts = read_members(self._storage, self._name, self._ranges, rows)
        keys = self._table.keys(rows)
        stored = getattr(torch, self._decode.stored_dtype.name)
        x = torch.zeros((self._batch_size, *self._decode.buffer_shape), dtype=stored)
        faults = self._decode_all(contents, list(x.numpy()), decoders)
        valid = np.ones(len(rows), np.bool_)
        valid[list(faults)] = False
        return RowBatch(
            x=self._decode.event_view(x),
            num_rows=len(rows),
            rows=rows,
            keys=keys,
            valid=valid,
            faults=[
                RowFault(int(rows[place]), keys[place], error.stage, error.reason)
                for place, error in sorted(faults.items())
            ],
            labels=self._table.labels[rows],
            metadata=[_text(content) for content in metadata],
            texts=[_text(content) for content in texts],
        )

    def _decode_all(
        self,
        contents: list[bytes | None],
        slots: list[NDArray[np.uint8]],
        decoders: ThreadPoolExecutor,
    ) -> dict[int, DecodeError]:
        """Decode each content into its slot; return the faults by place, their slots zeroed."""
        faults: dict[int, DecodeError] = {}

        def decode_part(part: int) -> None:
            for place in range(part, len(contents), self._threads):
                content = contents[place]
                try:
                    if content is None:
                        raise missing_member()
                    self._decode.decode(content, slots[place])
                except DecodeError as error:
                    faults[place] = error
                    slots[place][...] = 0

        for future in [decoders.submit(decode_part, part) for part in range(self._threads)]:
            future.result()
        return faults


def _text(content: bytes | None) -> str | None:
    return None if content is None else content.decode("utf-8", errors="replace")
