"""The index of a data set: what its shards hold, and where.

    shards --build_index, worker processes--> <out>/index/tables/<shard>.arrow  (one per shard)
                                              <out>/index/manifest.json         (last: atomic)
    <path>/index --Index.open--> counts per split, byte ranges, dataset_id

The same shards and split rule give the same bytes, however many workers or restarts it took.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.scan import ScannedShard, ShardEntry, index_shard
from pipeline.data.splits import ALL, SplitSpec
from pipeline.data.storage import find_shards, open_storage
from pipeline.data.table import ShardTable
from pipeline.data.tar import Damage
from pipeline.errors import UserError
from pipeline.files import canonical_json, write_json

FORMAT_VERSION = 1
INDEX_DIRECTORY = "index"
MANIFEST = "manifest.json"
TABLES = "tables"
MAX_OPEN_TABLES = 1024
ORDINAL_SHIFT = 48  # uid = ordinal * 2^48 + samples before
MAX_DUPLICATES_SHOWN = 20
PARALLEL_FROM_BYTES = 32 << 20  # below, starting worker processes takes longer than the work

Progress = Callable[[str], None]


class Index:
    """The opened index of one data set."""

    def __init__(self, path: Path, manifest: dict[str, Any], ordinal: int = 0) -> None:
        self.path = path
        self.ordinal = ordinal  # of the data set among those of a mixture
        self.dataset_id: str = manifest["dataset_id"]
        self.split_spec = SplitSpec(**manifest["split"])
        self.shards = [_entry_from_json(entry) for entry in manifest["shards"]]
        self.num_duplicate_keys: int = manifest["duplicate_keys"]["count"]
        self.duplicate_keys: list[list[str]] = manifest["duplicate_keys"]["examples"]
        self._split_digest = self.split_spec.digest()
        self.table = lru_cache(maxsize=MAX_OPEN_TABLES)(self._open_table)

    @classmethod
    def open(cls, path: Path | str, ordinal: int = 0) -> "Index":
        """Open `<path>/index`; raise UserError if there is none that this version reads."""
        manifest_path = Path(path) / INDEX_DIRECTORY / MANIFEST
        try:
            manifest = json.loads(manifest_path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{manifest_path} does not exist: run `latentmill index {path}` (data.path names "
                "the directory that holds `index/`)."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{manifest_path} cannot be read: {error}.") from None
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        if found != FORMAT_VERSION:
            raise UserError(
                f"{manifest_path} has format version {found}, this program reads {FORMAT_VERSION}: "
                f"run `latentmill index {path}` again."
            )
        return cls(Path(path), manifest, ordinal)

    @property
    def num_samples(self) -> int:
        """Samples in all splits together."""
        return sum(shard.samples for shard in self.shards)

    @property
    def damage(self) -> list[tuple[str, Damage]]:
        """Everything that the tar reader found wrong: (shard, what)."""
        return [(shard.name, damage) for shard in self.shards for damage in shard.damage]

    @cached_property
    def first_uids(self) -> NDArray[np.int64]:
        """The uid of each shard's first row: dataset ordinal * 2^48 + samples in earlier shards."""
        counts = [shard.samples for shard in self.shards]
        return (self.ordinal << ORDINAL_SHIFT) + np.concatenate([[0], np.cumsum(counts)])[:-1]

    def locate(self, uids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row) of samples by their uids."""
        # Of shards that start at the same uid all but the last are empty.
        shard = np.searchsorted(self.first_uids, uids, side="right") - 1
        return shard, uids - self.first_uids[shard]

    def keys_of(self, uids: NDArray[np.int64]) -> list[str]:
        """Keys of samples by their uids."""
        shards, rows = self.locate(uids)
        keys = [""] * len(uids)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            for place, key in zip(
                places.tolist(), self.table(shard).keys(rows[places]), strict=True
            ):
                keys[place] = key
        return keys

    def split_number(self, split: str) -> int | None:
        """The number of a split in the tables, None for `all`; raise UserError if unknown."""
        if split == ALL:
            return None
        if split not in self.split_spec.names:
            known = ", ".join((*self.split_spec.names, ALL))
            raise UserError(f"data.split = {split!r}: the index has the splits {known}.")
        return self.split_spec.names.index(split)

    def split_identity(self, split: str) -> str:
        """What makes a split the same rows: its name and the rule, or just `all`."""
        return ALL if self.split_number(split) is None else f"{split}/{self._split_digest}"

    def counts(self, split: str) -> NDArray[np.int64]:
        """Rows of one split in each shard."""
        if self.split_number(split) is None:
            return np.array([shard.samples for shard in self.shards], np.int64)
        return np.array([shard.splits[split] for shard in self.shards], np.int64)

    def check_shards(self, root: Path | str) -> None:
        """Raise UserError naming the first shard below `root` that is missing or has changed."""
        with closing(open_storage(root)) as storage:
            states = storage.states(shard.name for shard in self.shards)
        for shard in self.shards:
            state = states[shard.name]
            if state is not None and state.num_bytes == shard.bytes:
                continue
            found = (
                "is missing" if state is None else f"has {state.num_bytes} bytes, not {shard.bytes}"
            )
            raise UserError(
                f"The shard {storage.where(shard.name)} {found}: the index in "
                f"{self.path / INDEX_DIRECTORY} is of another state. Put the shard back, or run "
                f"`latentmill index {root}` (that makes it another data set)."
            )

    def _open_table(self, shard: int) -> ShardTable:
        entry = self.shards[shard]
        table = ShardTable(table_path(self.path, entry.name))
        origin = table.origin
        is_ours = (origin.shard_sha256, origin.split_digest) == (entry.sha256, self._split_digest)
        if not is_ours or table.num_rows != entry.samples:
            raise UserError(
                f"The index table of {entry.name} does not belong to {self.path / INDEX_DIRECTORY}/"
                f"{MANIFEST}: indexing was stopped half-way; run `latentmill index` again."
            )
        return table


def table_path(path: Path, shard_name: str) -> Path:
    """Where the table of a shard lies."""
    return path / INDEX_DIRECTORY / TABLES / f"{shard_name}.arrow"


def build_index(
    shards: Path | str,
    *,
    out: Path | None = None,
    split: SplitSpec | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Index:
    """Index a directory, glob or brace pattern of shards into `<out>/index`.

    `out`: None = beside the shards. Tables of unchanged shards are used again, so a stopped build
    goes on. Damage and duplicate keys are reported in the result, not raised. Raises UserError.
    """
    found = find_shards(shards)
    out = Path(found.root) if out is None else out
    if workers < 1:
        raise UserError(f"workers is {workers}, but must be at least 1.")
    split = split or SplitSpec()
    try:
        (out / INDEX_DIRECTORY / TABLES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out / INDEX_DIRECTORY} cannot be created ({error.strerror}): name a directory that "
            "can be written with --out."
        ) from None
    scanned: dict[str, ScannedShard] = {}
    for result in _scan_all(found.root, found.names, out, split, workers):
        scanned[result.entry.name] = result
        if progress:
            progress(f"index: {len(scanned)} of {len(found.names)} shards")
    manifest = _manifest([scanned[name] for name in found.names], split, out)
    write_json(out / INDEX_DIRECTORY / MANIFEST, manifest)
    _remove_old_tables(out, found.names)
    return Index.open(out)


def _scan_all(
    root: str, names: Sequence[str], out: Path, split: SplitSpec, workers: int
) -> Iterator[ScannedShard]:
    """Yield the shards as they are finished."""
    with closing(open_storage(root)) as storage:
        num_bytes = sum(state.num_bytes for state in storage.states(names).values() if state)
    workers = min(workers, len(names))
    if workers == 1 or num_bytes < PARALLEL_FROM_BYTES:
        for name in names:
            yield index_shard(root, name, table_path(out, name), split)
        return
    # Started afresh: a fork would copy the locks of this process's threads.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [
            pool.submit(index_shard, root, name, table_path(out, name), split) for name in names
        ]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _manifest(scanned: Sequence[ScannedShard], split: SplitSpec, out: Path) -> dict[str, Any]:
    entries = [result.entry for result in scanned]
    identity = [[entry.name, entry.bytes, entry.samples, entry.sha256] for entry in entries]
    return {
        "format_version": FORMAT_VERSION,
        "dataset_id": hashlib.sha256(canonical_json(identity)).hexdigest(),
        "split": split.model_dump(mode="json"),
        "samples": sum(entry.samples for entry in entries),
        "splits": {name: sum(entry.splits[name] for entry in entries) for name in split.names},
        "shards": [asdict(entry) for entry in entries],
        "duplicate_keys": _duplicates(scanned, out),
    }


def _duplicates(scanned: Sequence[ScannedShard], out: Path) -> dict[str, Any]:
    """Keys that several samples share: how many too many, and the first few with their shards."""
    hashes = np.sort(np.concatenate([result.key_hashes for result in scanned]))
    repeated = hashes[1:][hashes[1:] == hashes[:-1]]
    if len(repeated) == 0:
        return {"count": 0, "examples": []}
    wanted = np.unique(repeated)[:MAX_DUPLICATES_SHOWN]
    places: dict[str, list[str]] = {}
    for result in scanned:
        rows = np.flatnonzero(np.isin(result.key_hashes, wanted))
        if len(rows):
            for key in ShardTable(table_path(out, result.entry.name)).keys(rows):
                places.setdefault(key, []).append(result.entry.name)
    examples = [[key, *shards] for key, shards in sorted(places.items()) if len(shards) > 1]
    return {"count": len(repeated), "examples": examples}


def _remove_old_tables(out: Path, names: Sequence[str]) -> None:
    """Delete the tables of shards that are gone, and temporary files of killed builds."""
    wanted = {table_path(out, name) for name in names}
    for path in (out / INDEX_DIRECTORY / TABLES).rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()


def _entry_from_json(entry: dict[str, Any]) -> ShardEntry:
    damage = tuple(Damage(**fault) for fault in entry["damage"])
    return replace(ShardEntry(**entry), damage=damage)
