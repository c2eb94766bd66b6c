"""Rows of a Parquet file: latents straight from its pages, the small columns by pyarrow.

pyarrow decodes a whole row group (32 MB, about 0.1 s) to return one row. The writer stores latents
plain, without compression and nulls, so the values of a page have the same bytes in the file and in
memory: the headers are parsed once to find the pages, and a row is copied from the memory map.

    column chunk = pages; page = header, repetition levels, definition levels, values
"""

import json
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.common.labels import NO_LABEL
from pipeline.latents.files import ByteFile, Bytes
from pipeline.latents.formats.parquet.thrift import read_struct
from pipeline.latents.formats.reading import LABEL_TEXT, Ints, Layout, ShardReader, sparse
from pipeline.latents.rows import TEXTS

DATA_PAGE, PLAIN = 0, 0  # parquet.thrift: PageType, Encoding
MAX_HEADER_BYTES = 1024


class ParquetShard(ShardReader):
    """One file of `pipeline.latents.formats.parquet.writer`."""

    def __init__(self, files: Sequence[ByteFile], layout: Layout) -> None:
        """Read the footer."""
        (self._file,), self._layout = files, layout
        self._parquet = pq.ParquetFile(self._file.arrow())
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._first_row: Ints = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        self._leaf = {path.partition(".")[0]: number for number, path in enumerate(leaves)}
        self._pages: dict[tuple[int, str], tuple[Ints, Ints]] = {}
        self._texts: dict[str, Any] = {}

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def column(self, name: str, rows: Ints) -> NDArray[Any]:
        if name == LABEL_TEXT:
            return sparse(self._label_texts, rows)
        if name in TEXTS:
            return self._text(name).take(pa.array(rows)).to_numpy(zero_copy_only=False)
        return self._numbers[name][rows]

    def latents(self, field: str, rows: Ints) -> NDArray[Any]:
        layout = self._layout
        out = np.empty((len(rows), layout.row_bytes), np.uint8)
        groups = np.searchsorted(self._first_row, rows, side="right") - 1
        for group in np.unique(groups).tolist():
            positions = np.flatnonzero(groups == group)
            self._copy(group, field, rows[positions] - self._first_row[group], out, positions)
        return layout.to_array(out)

    @cached_property
    def _label_texts(self) -> dict[int, str]:
        metadata = self._parquet.schema_arrow.metadata or {}
        return label_texts_of(json.loads(metadata.get(b"latentmill", b"{}")))

    @cached_property
    def _numbers(self) -> dict[str, NDArray[Any]]:
        table = self._parquet.read(columns=["valid", "label"], use_threads=False)
        return {
            "valid": table["valid"].to_numpy(),
            "label": table["label"].fill_null(NO_LABEL).to_numpy(),
        }

    def _text(self, name: str) -> Any:
        """A column as a pyarrow array: Python strings would need several times the memory."""
        if name not in self._texts:
            table = self._parquet.read(columns=[name], use_threads=False)
            if name == "text" and name not in table.column_names:  # an export before that column
                table = table.append_column(name, pa.nulls(len(self), pa.string()))
            self._texts[name] = table[name].combine_chunks()
        return self._texts[name]

    def _copy(self, group: int, field: str, rows: Ints, out: Bytes, positions: Ints) -> None:
        """Copy rows of a row group into out[positions]; a row may span two pages."""
        chunk = self._chunk(group, field)
        if (group, field) not in self._pages:
            num_bytes = int(np.diff(self._first_row)[group]) * self._layout.row_bytes
            self._pages[group, field] = _find_pages(chunk, num_bytes, self._layout.stored)
        starts, offsets = self._pages[group, field]
        size = self._layout.row_bytes
        first = rows * size  # in the bytes of all values
        page = np.searchsorted(starts, first, side="right") - 1
        wholes = first + size <= starts[page + 1]
        froms = first - starts[page] + offsets[page]
        for position, start, whole in zip(positions.tolist(), froms.tolist(), wholes, strict=True):
            if whole:
                out[position] = chunk[start : start + size]
        for which in np.flatnonzero(~wholes).tolist():
            at, end, number = int(first[which]), int(first[which]) + size, int(page[which])
            pieces: list[Bytes] = []
            while at < end:
                stop = min(end, int(starts[number + 1]))
                low = int(offsets[number]) + at - int(starts[number])
                pieces.append(chunk[low : low + stop - at])
                at, number = stop, number + 1
            out[positions[which]] = np.concatenate(pieces)

    def _chunk(self, group: int, field: str) -> Bytes:
        if field not in self._leaf:
            raise ValueError(f"holds no {field}")
        column = self._parquet.metadata.row_group(group).column(self._leaf[field])
        if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
            raise ValueError(f"holds {field} compressed or as a dictionary")
        return self._file.view(column.data_page_offset, column.total_compressed_size)


def label_texts_of(described: Mapping[str, Any]) -> dict[int, str]:
    """Return the escaped texts by row from the description in a file's metadata."""
    return {int(row): text for row, text in described.get(LABEL_TEXT, {}).items()}


def _find_pages(chunk: Bytes, num_bytes: int, dtype: np.dtype[Any]) -> tuple[Ints, Ints]:
    """Return for each page the number of value bytes before it, with the total at the end, and the
    position of its values in the chunk. Raises ValueError unless all pages are plain.
    """
    starts, offsets, position = [0], list[int](), 0
    while position < len(chunk):
        header, begin = read_struct(chunk[position : position + MAX_HEADER_BYTES].tobytes())
        begin, end = position + begin, position + begin + header[3]
        page = header.get(5)
        if header[1] != DATA_PAGE or page is None or page[2] != PLAIN or header[2] != header[3]:
            raise ValueError("holds latents in pages that are not plain")
        for _ in range(2):  # repetition and definition levels, each with its length before it
            begin += 4 + struct.unpack("<I", chunk[begin : begin + 4].tobytes())[0]
        if end - begin != page[1] * dtype.itemsize:
            raise ValueError("holds nulls among its latents")
        starts.append(starts[-1] + end - begin)
        offsets.append(begin)
        position = end
    if starts[-1] != num_bytes:
        raise ValueError(f"holds {starts[-1]} bytes of latents instead of {num_bytes}")
    return np.array(starts, np.int64), np.array(offsets, np.int64)
