"""The table of one shard: a row per sample with its key, split and members, as an Arrow IPC file.

    samples --write_table--> <index>/tables/<shard>.arrow --ShardTable--> keys, byte ranges, splits

The file is memory-mapped: opening costs nothing, and only the rows asked for are read.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.tar import Damage, TarSample
from pipeline.errors import UserError
from pipeline.files import canonical_json, write_atomic

Ints = NDArray[np.int64]

ORIGIN = b"origin"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("split", pa.uint8(), nullable=False),
        pa.field("suffixes", pa.list_(pa.dictionary(pa.int16(), pa.string())), nullable=False),
        pa.field("offsets", pa.list_(pa.int64()), nullable=False),
        pa.field("sizes", pa.list_(pa.int64()), nullable=False),
    ]
)


@dataclass(frozen=True)
class TableOrigin:
    """What a table was made from: it is right for this content and this split rule only."""

    shard_bytes: int
    shard_sha256: str
    split_digest: str
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class MemberRanges:
    """Where the wanted member of every row of a shard lies; -1 where the row has none."""

    offset: Ints
    num_bytes: Ints


def write_table(
    path: Path, samples: Sequence[TarSample], splits: Sequence[int], origin: TableOrigin
) -> None:
    """Write one shard's table atomically; the same samples give the same bytes."""
    suffixes = sorted({suffix for sample in samples for suffix in sample.members})
    number = {suffix: i for i, suffix in enumerate(suffixes)}
    ends = np.cumsum([0, *(len(sample.members) for sample in samples)]).astype(np.int32)
    codes = [number[suffix] for sample in samples for suffix in sample.members]
    ranges = [where for sample in samples for where in sample.members.values()]
    dictionary = pa.DictionaryArray.from_arrays(
        pa.array(codes, pa.int16()), pa.array(suffixes, pa.string())
    )
    columns: list[Any] = [
        pa.array([sample.key for sample in samples], pa.large_string()),
        pa.array(splits, pa.uint8()),
        pa.ListArray.from_arrays(ends, dictionary),
        pa.ListArray.from_arrays(ends, pa.array([offset for offset, _ in ranges], pa.int64())),
        pa.ListArray.from_arrays(ends, pa.array([size for _, size in ranges], pa.int64())),
    ]
    metadata = {ORIGIN: canonical_json(asdict(origin))}
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sink.getvalue().to_pybytes())


class ShardTable:
    """The rows of one shard, in the order of the tar."""

    def __init__(self, path: Path) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                self._table: Any = pa.ipc.open_file(source).read_all().combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"The index table {path} cannot be read ({error}): delete it and run "
                "`latentmill index` again."
            ) from None
        origin = json.loads(self._table.schema.metadata[ORIGIN])
        damage = tuple(Damage(**entry) for entry in origin.pop("damage"))
        self.origin = TableOrigin(damage=damage, **origin)
        self.num_rows: int = self._table.num_rows
        self.ranges_of = lru_cache(maxsize=4)(self._ranges_of)
        self.rows_of = lru_cache(maxsize=4)(self._rows_of)

    def keys(self, rows: Ints | None = None) -> list[str]:
        """Keys of the given rows, or of all."""
        column = self._table["key"]
        return (column if rows is None else column.take(pa.array(rows))).to_pylist()

    @property
    def split_numbers(self) -> NDArray[np.uint8]:
        """The split number of every row."""
        return self._table["split"].to_numpy()

    def _rows_of(self, split_number: int | None) -> Ints:
        """Row numbers of one split, or of all, ascending."""
        if split_number is None:
            return np.arange(self.num_rows)
        return np.flatnonzero(self.split_numbers == split_number)

    def has_suffix(self, suffix: str) -> bool:
        """Tell whether any row has such a member."""
        return suffix in self._suffix_names

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """All members of one row: suffix -> (offset, bytes), in the order of the tar."""
        columns = ("suffixes", "offsets", "sizes")
        suffixes, offsets, sizes = (self._table[name][row].as_py() for name in columns)
        return dict(zip(suffixes, zip(offsets, sizes, strict=True), strict=True))

    def samples(self) -> list[TarSample]:
        """All rows, as the tar reader gave them."""
        return [TarSample(key, self.members(row)) for row, key in enumerate(self.keys())]

    def _ranges_of(self, wanted: tuple[str, ...]) -> MemberRanges:
        """Where the first of the wanted suffixes that a row has lies, for every row at once."""
        offset = np.full(self.num_rows, -1, np.int64)
        num_bytes = np.full(self.num_rows, -1, np.int64)
        if self.num_rows == 0:
            return MemberRanges(offset, num_bytes)
        lists = self._list_column("suffixes")
        codes = lists.values.indices.to_numpy()
        ends = lists.offsets.to_numpy()
        row_of_member = np.repeat(np.arange(self.num_rows), np.diff(ends))
        for suffix in reversed(wanted):  # the most wanted comes last and wins
            if suffix in self._suffix_names:
                found = np.flatnonzero(codes == self._suffix_names.index(suffix))
                offset[row_of_member[found]] = self._list_values("offsets")[found]
                num_bytes[row_of_member[found]] = self._list_values("sizes")[found]
        return MemberRanges(offset, num_bytes)

    @cached_property
    def _suffix_names(self) -> list[str]:
        if self.num_rows == 0:
            return []
        return self._list_column("suffixes").values.dictionary.to_pylist()

    def _list_column(self, name: str) -> Any:
        return self._table[name].chunk(0)  # one record batch was written

    def _list_values(self, name: str) -> Ints:
        return self._list_column(name).values.to_numpy()
