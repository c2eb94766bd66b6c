"""Rows of the Parquet and Arrow files of `datasets`: read memory-mapped, some at a time.

file -> schema, sizes of the pictures --FileRows--> a dictionary per row, of Python's types
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from pipeline.common.errors import UserError

ROWS = 16  # at a time: a row may be a large picture
SMALL_BYTES = 1024  # where rows are smaller on average, they may hold paths instead of pictures


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the batches of an Arrow file: of a stream, as `datasets` writes it."""
    source = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:  # Arrow's other format, which `datasets` reads, too
        reader = pa.ipc.open_file(source)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    return reader.schema, iter(reader)


@dataclass(frozen=True)
class FileRows:
    """Rows lo..hi-1 of a file."""

    path: Path
    lo: int
    hi: int
    first: int = 0  # number of the file's row 0 in its split
    prefix: str = ""  # of all keys

    def read(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows with their numbers in the split; raises UserError for a damaged file."""
        with _reading(self.path):
            for first, batch in self._batches(list(columns)):
                if first >= self.hi:  # of a large group of rows
                    return
                stop = min(self.hi - first, batch.num_rows)
                for at in range(max(self.lo - first, 0), stop, ROWS):
                    few = batch.slice(at, min(ROWS, stop - at)).to_pylist()
                    yield from enumerate(few, self.first + first + at)

    def _batches(self, columns: list[str]) -> Iterator[tuple[int, Any]]:
        """Yield what holds the rows, in sequence, each with the number of its first row."""
        at = 0
        if self.path.suffix != ".parquet":
            for batch in _arrow(self.path)[1]:
                if at < self.hi and self.lo < at + batch.num_rows:
                    yield at, batch.select(columns)
                at += batch.num_rows
            return
        with pq.ParquetFile(self.path, memory_map=True, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                first, at = at, at + file.metadata.row_group(group).num_rows
                if first < self.hi and self.lo < at:
                    for batch in file.iter_batches(ROWS, [group], columns, use_threads=False):
                        yield first, batch
                        first += batch.num_rows


def read_schema(path: Path) -> Any:
    """Return names and types of a file's columns."""
    with _reading(path):
        if path.suffix == ".parquet":
            return pq.read_schema(path)
        return _arrow(path)[0]


def picture_of(value: Any) -> tuple[bytes | None, str | None]:
    """Return the bytes and the path of a picture, of which one may be missing."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return (None, value) if isinstance(value, str) else (value, None)


def file_of(root: Path, rows: Path, path: str) -> Path:
    """The file of a path, which is relative to the data set, or to the file of its row."""
    return next((f for f in (root / path, rows.parent / path) if f.is_file()), root / path)


def picture_sizes(root: Path, path: Path, image: str) -> list[int]:
    """Return a size for each row: where pictures lie together, the mean of those."""
    with _reading(path):
        blocks = list(_blocks(path, image))
    num_rows = sum(count for count, _ in blocks)
    if sum(num_bytes for _, num_bytes in blocks) >= SMALL_BYTES * num_rows:
        return [num_bytes // count for count, num_bytes in blocks for _ in range(count)]
    sizes: list[int] = []
    for _, row in FileRows(path, 0, num_rows).read([image]):
        content, name = picture_of(row[image])
        file = file_of(root, path, name or "")
        sizes.append(len(content) if content else file.stat().st_size if file.is_file() else 0)
    return sizes


def _blocks(path: Path, image: str) -> Iterator[tuple[int, int]]:
    """Yield rows, and bytes of the pictures' column, of each part of a file."""
    if path.suffix == ".parquet":
        metadata = pq.read_metadata(path)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks = map(group.column, range(group.num_columns))
            own = [c for c in chunks if c.path_in_schema.partition(".")[0] == image]
            yield group.num_rows, sum(c.total_uncompressed_size for c in own)
    else:
        for batch in _arrow(path)[1]:
            yield batch.num_rows, batch.column(image).nbytes


def is_text(kind: Any) -> bool:
    """Whether the values of a type are texts."""
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_class(kind: Any) -> bool:
    """Whether the values of a type are texts, integers or booleans."""
    return is_text(kind) or types.is_integer(kind) or types.is_boolean(kind)


def is_picture(kind: Any) -> bool:
    """Whether a type is that in which `datasets` keeps pictures."""
    return types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def may_be_picture(kind: Any) -> bool:
    """Whether a type can hold pictures or their paths."""
    return is_picture(kind) or is_text(kind) or (holds_bytes(kind) and not kind.num_fields)


def holds_bytes(kind: Any) -> bool:
    """Whether the values of a type, or parts of them, are bytes, which JSON cannot hold."""
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
        or any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    )
