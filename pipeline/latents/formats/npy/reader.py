"""Rows of a matrix of mu or z, [n, elements] in C order, and of the Parquet file beside it."""

import ast
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.latents.files import ByteFile
from pipeline.latents.formats.parquet.reader import ParquetShard
from pipeline.latents.formats.reading import Ints, Layout, ShardReader, gather

MAGIC = b"\x93NUMPY\x01\x00"  # version 1: two bytes of header length follow
START = len(MAGIC) + 2


class NpyShard(ShardReader):
    """The two files of `pipeline.latents.formats.npy.writer`."""

    def __init__(self, files: Sequence[ByteFile], layout: Layout) -> None:
        """Read the header of the matrix and the footer of its sidecar."""
        if len(files) != 2:
            raise ValueError(f"stands for {len(files)} files instead of a matrix and its sidecar")
        self._matrix, self._layout = files[0], layout
        self._sidecar = ParquetShard(files[1:], layout)
        self._offset = _check_header(files[0], len(self._sidecar), layout)

    def __len__(self) -> int:
        return len(self._sidecar)

    def column(self, name: str, rows: Ints) -> NDArray[Any]:
        return self._sidecar.column(name, rows)

    def latents(self, field: str, rows: Ints) -> NDArray[Any]:
        if field != self._layout.main:
            return self._sidecar.latents(field, rows)
        size = self._layout.row_bytes
        return self._layout.to_array(gather(self._matrix, self._offset, len(self), rows, size))


def _check_header(file: ByteFile, num_rows: int, layout: Layout) -> int:
    """Return the offset of the values; raise ValueError unless they match the layout."""
    start = file.view(0, min(START, file.size)).tobytes()
    if start[: len(MAGIC)] != MAGIC or len(start) < START:
        raise ValueError("is no .npy file")
    offset = START + struct.unpack("<H", start[-2:])[0]
    header = ast.literal_eval(file.view(START, offset - START).tobytes().decode("latin1").strip())
    found = (np.dtype(header["descr"]), header["fortran_order"], tuple(header["shape"]))
    elements = layout.row_bytes // layout.stored.itemsize
    expected = (layout.stored, False, (num_rows, elements))
    if found != expected or file.size - offset != num_rows * layout.row_bytes:
        raise ValueError(f"holds a matrix of {found}, where the manifest has {expected}")
    return offset
