"""The interface of readers of one shard's files, and what they share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.latents.files import ByteFile, Bytes
from pipeline.latents.rows import TEXTS

NUMBERS = ("valid", "label")
LABEL_TEXT = "label_text"  # what stands for a label that is no integer, or is -1; else None
COLUMNS = (*TEXTS, *NUMBERS, LABEL_TEXT)  # of every row, besides its latents
REMOTE_BLOCK_BYTES = 4 << 20  # rows of a remote matrix are fetched in blocks of about this size

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Fields, shape and type of the latents of every row, from the manifest."""

    fields: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str  # float32, float16 or bfloat16

    @property
    def main(self) -> str:
        """The first field: mu, or z."""
        return self.fields[0]

    @cached_property
    def stored(self) -> np.dtype[Any]:
        """The numpy type of the stored bits; uint16 for bfloat16, which numpy lacks."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def array_dtype(self) -> str:
        """The type of the returned arrays: float32 for bfloat16, which it holds exactly."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row's latent."""
        return math.prod(self.shape) * self.stored.itemsize

    def to_array(self, rows: Bytes) -> NDArray[Any]:
        """Return latents [n, *shape] from their bytes [n, row_bytes]."""
        values = rows.view(self.stored)
        if self.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(len(rows), *self.shape)


class ShardReader(ABC):
    """One shard in one format. Damaged files raise ValueError, at the latest during a read."""

    @abstractmethod
    def __init__(self, files: Sequence[ByteFile], layout: Layout) -> None:
        """Take the shard's files, in the manifest's order, without reading latents."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows in the shard."""

    @abstractmethod
    def column(self, name: str, rows: Ints) -> NDArray[Any]:
        """Return one of COLUMNS for some rows; texts are objects, None where there is none.

        A text that is not UTF-8 comes as `pipeline.common.texts.escaped` makes it.
        """

    @abstractmethod
    def latents(self, field: str, rows: Ints) -> NDArray[Any]:
        """Return one field's latents [n, *shape] for some rows, copied."""


def sparse(texts: Mapping[int, str], rows: Ints) -> NDArray[Any]:
    """Return the texts [n] of some rows as objects: None where a row has none."""
    found = np.empty(len(rows), np.object_)
    found[:] = [texts.get(row) for row in rows.tolist()]
    return found


def gather(file: ByteFile, offset: int, num_rows: int, rows: Ints, row_bytes: int) -> Bytes:
    """Return rows [n, row_bytes] of a matrix that lies in a file from `offset` on, copied."""
    if file.is_mapped:
        return file.view(offset, num_rows * row_bytes).reshape(num_rows, row_bytes)[rows]
    out = np.empty((len(rows), row_bytes), np.uint8)
    rows_per_block = max(1, REMOTE_BLOCK_BYTES // row_bytes)
    blocks = rows // rows_per_block
    for block in np.unique(blocks).tolist():
        start = block * rows_per_block
        stop = min(start + rows_per_block, num_rows)
        data = file.view(offset + start * row_bytes, (stop - start) * row_bytes)
        chosen = blocks == block
        out[chosen] = data.reshape(-1, row_bytes)[rows[chosen] - start]
    return out
