"""Indexing one shard: what a worker process does.

    shard -> sha256, tar scan -> samples -> split of each -> table -> ShardEntry for the manifest

A table carries its shard's modification time as its own, so an unchanged shard (same size, same
time) is not read again, and no time stands in any file's content. After a crash the tables that
are there count: nothing else has to be remembered.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.splits import SplitSpec, group_of
from pipeline.data.storage import Storage, open_storage
from pipeline.data.table import ShardTable, TableOrigin, write_table
from pipeline.data.tar import Damage, ReadBytes, TarSample, TarScan, group_samples
from pipeline.errors import UserError
from pipeline.files import sha256_file

CHUNK_BYTES = 1 << 20
MAX_REPORTED_DAMAGE = 100  # per shard


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `splits`: samples per split."""

    name: str
    bytes: int
    samples: int
    sha256: str
    splits: dict[str, int]
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class ScannedShard:
    """A shard's entry, and a 64-bit hash of each key, by which duplicates are found."""

    entry: ShardEntry
    key_hashes: NDArray[np.uint64]


def index_shard(root: str, name: str, table_path: Path, split: SplitSpec) -> ScannedShard:
    """Bring one shard's table up to date and describe it; raise UserError on no permission."""
    try:
        table = _reusable_table(Path(root) / name, table_path)
        if table is None:
            _write(root, name, table_path, split)
        elif table.origin.split_digest != split.digest():
            _split_again(root, name, table_path, split, table)
        return _describe(name, ShardTable(table_path), split)
    except PermissionError as error:
        raise UserError(f"Indexing {root}/{name}: {error}.") from None


def _reusable_table(shard: Path, table_path: Path) -> ShardTable | None:
    status = shard.stat()
    if not table_path.exists() or table_path.stat().st_mtime_ns != status.st_mtime_ns:
        return None
    try:
        table = ShardTable(table_path)
    except UserError:
        return None  # damaged: it is made anew
    return table if table.origin.shard_bytes == status.st_size else None


def _write(root: str, name: str, table_path: Path, split: SplitSpec) -> None:
    status = (Path(root) / name).stat()
    with closing(open_storage(root)) as storage:
        scan = TarScan(_chunked_reader(storage, name, status.st_size), status.st_size)
        samples = list(group_samples(scan))
        splits = _splits(storage, name, samples, split)
    damage = scan.damage[:MAX_REPORTED_DAMAGE]
    if len(scan.damage) > len(damage):
        more = len(scan.damage) - len(damage)
        damage.append(Damage("more", damage[-1].offset, 0, f"{more} further faults"))
    sha256 = sha256_file(Path(root) / name)
    origin = TableOrigin(status.st_size, sha256, split.digest(), tuple(damage))
    write_table(table_path, samples, splits, origin)
    os.utime(table_path, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _split_again(
    root: str, name: str, table_path: Path, split: SplitSpec, table: ShardTable
) -> None:
    """Rewrite a table for another split rule; only metadata members are read, if any."""
    mtime_ns = table_path.stat().st_mtime_ns
    samples = table.samples()
    with closing(open_storage(root)) as storage:
        splits = _splits(storage, name, samples, split)
    old = table.origin
    origin = TableOrigin(old.shard_bytes, old.shard_sha256, split.digest(), old.damage)
    write_table(table_path, samples, splits, origin)
    os.utime(table_path, ns=(mtime_ns, mtime_ns))


def _chunked_reader(storage: Storage, name: str, size: int) -> ReadBytes:
    """Serve the scan's small forward reads from one chunk at a time."""
    chunk, chunk_start = b"", 0

    def read(offset: int, num_bytes: int) -> bytes:
        nonlocal chunk, chunk_start
        num_bytes = max(0, min(num_bytes, size - offset))
        if offset < chunk_start or offset + num_bytes > chunk_start + len(chunk):
            chunk_start = offset
            chunk = storage.read(name, offset, min(max(num_bytes, CHUNK_BYTES), size - offset))
        return chunk[offset - chunk_start : offset - chunk_start + num_bytes]

    return read


def _splits(
    storage: Storage, name: str, samples: Sequence[TarSample], split: SplitSpec
) -> list[int]:
    field = split.json_field
    if field is None:
        return [split.number_of(sample.key) for sample in samples]
    numbers: list[int] = []
    for sample in samples:
        where = f"{storage.where(name)}, sample {sample.key!r}"
        if "json" not in sample.members:
            raise UserError(f"{where}: no .json member, but the split is made by json.{field}.")
        metadata = storage.read(name, *sample.members["json"])
        numbers.append(split.number_of(group_of(metadata, field, where)))
    return numbers


def _describe(name: str, table: ShardTable, split: SplitSpec) -> ScannedShard:
    counts = np.bincount(table.split_numbers, minlength=len(split.names)).tolist()
    entry = ShardEntry(
        name=name,
        bytes=table.origin.shard_bytes,
        samples=table.num_rows,
        sha256=table.origin.shard_sha256,
        splits=dict(zip(split.names, counts, strict=True)),
        damage=table.origin.damage,
    )
    keys = table.keys()
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return ScannedShard(entry, np.frombuffer(b"".join(digests), np.uint64))
