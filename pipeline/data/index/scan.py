"""Indexing one shard: what a worker process does.

    shard -> one forward pass: sha256, tar scan, CRC-32 per member if `deep`, split of each sample
          -> table -> ShardEntry for the manifest

An unchanged shard is not read again. A local shard is recognised by size and modification time,
which is also the modification time of its table; a remote one by size and tag, which the table
holds. A remote shard without a tag is always read. After a crash, only the existing tables count.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.data.index.contents import ContentChecks
from pipeline.data.index.left_out import Counts, Damage
from pipeline.data.index.one_pass import OnePass
from pipeline.data.index.splits import SplitSpec, group_of
from pipeline.data.index.table import ShardTable, TableOrigin, write_table
from pipeline.data.index.tar import TarSample, group_samples, split_name
from pipeline.data.index.tar_scan import NO_CHECKSUM, TarScan
from pipeline.data.storage import ShardReadError, ShardState, Storage, is_url, open_storage

MAX_REPORTED_DAMAGE = 100  # per shard


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `splits`: samples per split; `tag`: the store's."""

    name: str
    bytes: int
    samples: int
    sha256: str
    splits: dict[str, int]
    damage: tuple[Damage, ...]
    has_checksums: bool = False
    tag: str | None = None
    left_out: Counts = field(default_factory=Counts)


@dataclass(frozen=True)
class ScannedShard:
    """A shard's entry, and what is merged over all shards.

    key_hashes: 64 bits of each key, to find duplicates; suffixes: number of rows per suffix;
    is_read: False if the shard was known from before; is_written: its table is new.
    """

    entry: ShardEntry
    key_hashes: NDArray[np.uint64]
    suffixes: dict[str, int]
    is_read: bool
    is_written: bool


@dataclass(frozen=True)
class ShardTask:
    """A shard to index: its location, the path of its table, checksums or not, the split rule."""

    root: str
    name: str
    table_path: Path
    split: SplitSpec
    deep: bool

    @property
    def stamp(self) -> int | None:
        """Modification time of a local shard in nanoseconds."""
        return None if is_url(self.root) else (Path(self.root) / self.name).stat().st_mtime_ns


def index_shard(task: ShardTask) -> ScannedShard:
    """Bring one shard's table up to date and describe it; raise UserError if it is unreadable."""
    try:
        with closing(open_storage(task.root)) as storage:
            state = storage.states([task.name])[task.name]
            if state is None:
                raise UserError(f"The shard {storage.where(task.name)} is gone.")
            table = _reusable_table(task, state)
            is_read, is_written = table is None, True
            if table is None:
                _write(task, storage, state)
            elif table.origin.split_digest != task.split.digest():
                is_read = _split_again(task, storage, state, table)
            else:
                is_written = False
        return _describe(task, ShardTable(task.table_path), is_read, is_written)
    except (PermissionError, ShardReadError, FileNotFoundError) as error:
        raise UserError(f"Indexing {task.root}/{task.name}: {error}") from None


def _reusable_table(task: ShardTask, state: ShardState) -> ShardTable | None:
    path, stamp = task.table_path, task.stamp
    if not path.exists() or (stamp is not None and path.stat().st_mtime_ns != stamp):
        return None
    try:
        table = ShardTable(path)
    except UserError:
        return None  # damaged: write a new one
    origin = table.origin
    if stamp is None and (state.tag is None or origin.tag != state.tag):
        return None
    is_enough = table.is_counted and (table.has_checksums or not task.deep)
    return table if is_enough and origin.shard_bytes == state.num_bytes else None


def _write(task: ShardTask, storage: Storage, state: ShardState) -> None:
    """Read the shard in one forward pass and write its table."""
    stamp = task.stamp
    groups = _Groups(task, storage.where(task.name))
    with OnePass(storage, task.name, state.num_bytes) as reader:
        contents = ContentChecks(reader, with_json=task.deep)

        def visit(name: str, offset: int, num_bytes: int, crc32: int) -> int:
            groups.visit(reader, name, offset, num_bytes)
            contents.visit(name, offset, num_bytes)
            is_known = crc32 != NO_CHECKSUM or not task.deep
            return crc32 if is_known else reader.crc32(offset, num_bytes)

        scan = TarScan(reader.read, state.num_bytes, visit)
        samples = list(group_samples(scan))
        sha256 = reader.sha256()
    contents.count(samples, scan.left_out)
    damage = scan.damage[:MAX_REPORTED_DAMAGE]
    if len(scan.damage) > len(damage):
        more = len(scan.damage) - len(damage)
        damage.append(Damage("more", damage[-1].offset, 0, f"{more} further faults"))
    digest = task.split.digest()
    counts = scan.left_out.counts
    origin = TableOrigin(state.num_bytes, sha256, digest, tuple(damage), state.tag, counts)
    numbers, labels = groups.numbers(samples), contents.labels(samples)
    _write_table(task, samples, numbers, labels, origin, task.deep, stamp)


def _write_table(
    task: ShardTask,
    samples: Sequence[TarSample],
    splits: Sequence[int],
    labels_of: Sequence[int],
    origin: TableOrigin,
    with_checksums: bool,
    stamp: int | None,
) -> None:
    write_table(task.table_path, samples, splits, labels_of, origin, with_checksums=with_checksums)
    if stamp is not None:
        os.utime(task.table_path, ns=(stamp, stamp))


def _split_again(task: ShardTask, storage: Storage, state: ShardState, table: ShardTable) -> bool:
    """Rewrite a table for another split rule; return whether the shard had to be read."""
    if task.split.json_field is not None and is_url(task.root):
        # For a URL one pass costs less than a request per sample.
        _write(replace(task, deep=table.has_checksums), storage, state)
        return True
    stamp = task.stamp
    samples = table.samples()
    groups = _Groups(task, storage.where(task.name))
    if groups.field is not None:
        for sample in samples:
            if "json" in sample.members:
                offset, num_bytes = sample.members["json"]
                metadata = storage.read(task.name, offset, num_bytes)
                groups.add(sample.key, offset, metadata)
    origin = replace(table.origin, split_digest=task.split.digest())
    splits = groups.numbers(samples)
    _write_table(task, samples, splits, table.labels.tolist(), origin, table.has_checksums, stamp)
    return False


class _Groups:
    """Split numbers of samples; those by metadata are computed during the pass over the shard."""

    def __init__(self, task: ShardTask, where: str) -> None:
        self.field = task.split.json_field
        self._split = task.split
        self._where = where
        self._number_at: dict[int, int] = {}  # by the offset of the .json member

    def visit(self, reader: OnePass, name: str, offset: int, num_bytes: int) -> None:
        found = split_name(name) if self.field is not None else None
        if found is not None and found[1] == "json" and offset not in self._number_at:
            self.add(found[0], offset, reader.read(offset, num_bytes))

    def add(self, key: str, offset: int, metadata: bytes) -> None:
        assert self.field is not None
        group = group_of(metadata, self.field, f"{self._where}, sample {key!r}")
        self._number_at[offset] = self._split.number_of(group)

    def numbers(self, samples: Sequence[TarSample]) -> list[int]:
        """The split number of each sample; raise UserError for one without metadata."""
        if self.field is None:
            return [self._split.number_of(sample.key) for sample in samples]
        for sample in samples:
            if "json" not in sample.members:
                raise UserError(
                    f"{self._where}, sample {sample.key!r}: no .json member, but the split is made "
                    f"by json.{self.field}."
                )
        return [self._number_at[sample.members["json"][0]] for sample in samples]


def _describe(task: ShardTask, table: ShardTable, is_read: bool, is_written: bool) -> ScannedShard:
    split = task.split
    counts = np.bincount(table.split_numbers, minlength=len(split.names)).tolist()
    entry = ShardEntry(
        name=task.name,
        bytes=table.origin.shard_bytes,
        samples=table.num_rows,
        sha256=table.origin.shard_sha256,
        splits=dict(zip(split.names, counts, strict=True)),
        damage=table.origin.damage,
        has_checksums=table.has_checksums,
        tag=table.origin.tag,
        left_out=table.origin.left_out,
    )
    keys = table.keys()
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    hashes = np.frombuffer(b"".join(digests), np.uint64)
    return ScannedShard(entry, hashes, table.suffix_counts(), is_read, is_written)
