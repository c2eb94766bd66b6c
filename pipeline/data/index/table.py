"""The table of one shard: a row per sample with its key, split and members, as an Arrow IPC file.

    samples --write_table--> <index>/tables/<shard>.arrow --ShardTable--> keys, byte ranges, splits

A local file is memory-mapped, so only requested rows are read. The column `crc32` exists if the
shard was indexed with `--deep`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json, write_atomic
from pipeline.data.index.left_out import Counts, Damage
from pipeline.data.index.tar import TarSample

Ints = NDArray[np.int64]

ORIGIN = b"origin"
CHECKSUMS = "crc32"
MEMBER_FIELDS = ("offset", "num_bytes", "crc32")
MAX_INT16 = 2**15 - 1


@dataclass(frozen=True)
class TableOrigin:
    """What a table was made from: it is valid for this content and this split rule only.

    `tag`: the store's tag of the content, if any; an equal tag saves reading the shard again.
    """

    shard_bytes: int
    shard_sha256: str
    split_digest: str
    damage: tuple[Damage, ...]
    tag: str | None = None
    left_out: Counts = field(default_factory=Counts)


@dataclass(frozen=True)
class MemberRanges:
    """Where the wanted member of every row of a shard lies; -1 where the row has none.

    crc32: of the member's bytes; -1 where it is not known.
    """

    offset: Ints
    num_bytes: Ints
    crc32: Ints


def write_table(
    path: Path,
    samples: Sequence[TarSample],
    splits: Sequence[int],
    labels: Sequence[int],
    origin: TableOrigin,
    *,
    with_checksums: bool,
) -> None:
    """Write one shard's table atomically; the same samples give the same bytes."""
    suffixes = sorted({suffix for sample in samples for suffix in sample.members})
    number = {suffix: i for i, suffix in enumerate(suffixes)}
    ends = np.cumsum([0, *(len(sample.members) for sample in samples)]).astype(np.int32)
    codes = [number[suffix] for sample in samples for suffix in sample.members]
    ranges = [where for sample in samples for where in sample.members.values()]
    code_type = pa.int16() if len(suffixes) <= MAX_INT16 else pa.int32()
    dictionary = pa.DictionaryArray.from_arrays(
        pa.array(codes, code_type), pa.array(suffixes, pa.string())
    )
    columns: dict[str, Any] = {
        "key": pa.array([sample.key for sample in samples], pa.large_string()),
        "split": pa.array(splits, pa.uint8()),
        "label": pa.array(labels, pa.int64()),
        "suffixes": pa.ListArray.from_arrays(ends, dictionary),
        "offsets": pa.ListArray.from_arrays(ends, pa.array([at for at, _ in ranges], pa.int64())),
        "sizes": pa.ListArray.from_arrays(ends, pa.array([n for _, n in ranges], pa.int64())),
    }
    if with_checksums:
        checksums = [sample.checksums[name] for sample in samples for name in sample.members]
        columns[CHECKSUMS] = pa.ListArray.from_arrays(ends, pa.array(checksums, pa.uint32()))
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    schema = pa.schema(fields, metadata={ORIGIN: canonical_json(asdict(origin))})
    table = pa.Table.from_arrays(list(columns.values()), schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sink.getvalue().to_pybytes())


class ShardTable:
    """The rows of one shard, in the order of the tar."""

    def __init__(self, source: Path | bytes, where: str | None = None) -> None:
        """Open a local file, or the content of a remote one; `where` names that in errors."""
        is_file = isinstance(source, Path)
        try:
            with pa.memory_map(str(source)) if is_file else pa.BufferReader(source) as file:
                self._table: Any = pa.ipc.open_file(file).read_all().combine_chunks()
            origin = json.loads(self._table.schema.metadata[ORIGIN])
            damage = tuple(Damage(**entry) for entry in origin.pop("damage"))
            self.is_counted = "left_out" in origin  # tables of the first version have no counts
            self.origin = TableOrigin(damage=damage, **origin)
        except (OSError, pa.ArrowInvalid, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The index table {where or source} cannot be read ({error}): delete it and run "
                "`latentmill index` again."
            ) from None
        self.num_rows: int = self._table.num_rows
        self.ranges_of = lru_cache(maxsize=4)(self._ranges_of)
        self.rows_of = lru_cache(maxsize=4)(self._rows_of)
        self.split_columns = lru_cache(maxsize=4)(self._split_columns)

    @property
    def has_checksums(self) -> bool:
        """Whether the CRC-32 of every member is known."""
        return CHECKSUMS in self._table.schema.names

    def keys(self, rows: Ints | None = None) -> list[str]:
        """Keys of the given rows, or of all."""
        column = self._table["key"]
        return (column if rows is None else column.take(pa.array(rows))).to_pylist()

    @property
    def split_numbers(self) -> NDArray[np.uint8]:
        """The split number of every row."""
        return _numbers(self._column("split")) if self.num_rows else np.zeros(0, np.uint8)

    @cached_property
    def labels(self) -> Ints:
        """The class of every row; -1 where it has none."""
        return _numbers(self._column("label")) if self.num_rows else np.zeros(0, np.int64)

    def _rows_of(self, split_number: int | None) -> Ints:
        """Row numbers of one split, or of all, ascending."""
        if split_number is None:
            return np.arange(self.num_rows)
        return np.flatnonzero(self.split_numbers == split_number)

    def _split_columns(self, split_number: int | None, wanted: tuple[str, ...]) -> Ints:
        """[5, rows of the split]: offset, bytes and CRC-32 as in `ranges_of`, label, row number.

        All that reading any rows needs, for one lookup by row.
        """
        rows, ranges = self._rows_of(split_number), self._ranges_of(wanted)
        columns = (ranges.offset, ranges.num_bytes, ranges.crc32, self.labels)
        return np.stack([*(column[rows] for column in columns), rows])

    def suffix_counts(self) -> dict[str, int]:
        """How many rows have a member of each suffix."""
        if self.num_rows == 0:
            return {}
        codes = _numbers(self._column("suffixes").values.indices)
        counts = np.bincount(codes, minlength=len(self._suffix_names)).tolist()
        return dict(zip(self._suffix_names, counts, strict=True))

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """All members of one row: suffix -> (offset, bytes), in the order of the tar."""
        columns = ("suffixes", "offsets", "sizes")
        suffixes, offsets, sizes = (self._table[name][row].as_py() for name in columns)
        return dict(zip(suffixes, zip(offsets, sizes, strict=True), strict=True))

    def samples(self) -> list[TarSample]:
        """All rows as `TarSample`s, members in the order of the tar."""
        names = ("suffixes", "offsets", "sizes", *((CHECKSUMS,) if self.has_checksums else ()))
        rows = zip(self.keys(), *(self._table[name].to_pylist() for name in names), strict=True)
        return [
            TarSample(
                key,
                dict(zip(suffixes, zip(offsets, sizes, strict=True), strict=True)),
                dict(zip(suffixes, *checksums, strict=True)) if checksums else {},
            )
            for key, suffixes, offsets, sizes, *checksums in rows
        ]

    def _ranges_of(self, wanted: tuple[str, ...]) -> MemberRanges:
        """The range of each row's member, by the first of the wanted suffixes that the row has."""
        columns = {"offsets": "offset", "sizes": "num_bytes"}
        columns |= {CHECKSUMS: "crc32"} if self.has_checksums else {}
        found = {name: np.full(self.num_rows, -1, np.int64) for name in MEMBER_FIELDS}
        if self.num_rows == 0:
            return MemberRanges(**found)
        lists = self._column("suffixes")
        codes = _numbers(lists.values.indices)
        ends = _numbers(lists.offsets)
        row_of_member = np.repeat(np.arange(self.num_rows), np.diff(ends))
        for suffix in reversed(wanted):  # the preferred suffix comes last and overwrites others
            if suffix in self._suffix_names:
                matches = np.flatnonzero(codes == self._suffix_names.index(suffix))
                for column, name in columns.items():
                    values = _numbers(self._column(column).values)
                    found[name][row_of_member[matches]] = values[matches]
        return MemberRanges(**found)

    @cached_property
    def _suffix_names(self) -> list[str]:
        if self.num_rows == 0:
            return []
        return self._column("suffixes").values.dictionary.to_pylist()

    def _column(self, name: str) -> Any:
        return self._table[name].chunk(0)  # the file holds one record batch


def _numbers(array: Any) -> NDArray[Any]:
    """An Arrow array of numbers without nulls, not copied; `to_numpy` would import pandas."""
    values = np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())
    return values[array.offset : array.offset + len(array)]
