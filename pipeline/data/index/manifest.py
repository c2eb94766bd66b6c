"""The files of an index: their names, reading them, and building the manifest.

    <path>/index/manifest.json, <path>/index/tables/<shard>.arrow; <path>: a directory or a URL

File names follow from shard names alone, never from keys, and cannot leave the directory.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json
from pipeline.data.index.left_out import Counts, Damage
from pipeline.data.index.scan import ScannedShard, ShardEntry
from pipeline.data.index.splits import SplitSpec
from pipeline.data.index.table import ShardTable
from pipeline.data.storage import RemotePolicy, is_url, open_storage

FORMAT_VERSION = 2  # 2: labels in the tables
INDEX_DIRECTORY = "index"
MANIFEST = "manifest.json"
TABLES = "tables"
MAX_DUPLICATES_SHOWN = 20
MAX_SUFFIXES = 1000  # more suffixes are dots in file names rather than kinds of members


class NoIndexError(UserError):
    """A place that holds no index."""


def check_shard_name(name: str) -> None:
    """Raise UserError for a name that would lead out of the directory it is appended to."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"The shard name {name!r} does not lie below the data set's root: name the shards by "
            "one pattern without `..`."
        )


def table_name(shard_name: str) -> str:
    """The name of a shard's table, relative to the index's path."""
    check_shard_name(shard_name)
    return f"{INDEX_DIRECTORY}/{TABLES}/{shard_name}.arrow"


def table_path(path: Path, shard_name: str) -> Path:
    """The local path of a shard's table."""
    return path / PurePosixPath(table_name(shard_name))


def without_query(root: Path | str) -> str:
    """Return a root without its query, which may hold a secret."""
    return str(root).partition("?")[0]


class IndexFiles:
    """Reads the files of an index, local or remote."""

    def __init__(self, path: Path | str, remote: RemotePolicy | None = None) -> None:
        self._storage = open_storage(path, remote)
        self.path: Path | str = path if is_url(path) else Path(self._storage.root)

    def where(self, name: str) -> str:
        """The full path or URL of a file, for messages."""
        return self._storage.where(name)

    def read(self, name: str) -> bytes:
        """The content of a file; raise OSError, FileNotFoundError if it is not there."""
        if isinstance(self.path, Path):
            return (self.path / name).read_bytes()
        state = self._storage.states([name])[name]
        if state is None:
            raise FileNotFoundError(self.where(name))
        return self._storage.read(name, 0, state.num_bytes) if state.num_bytes else b""

    def table(self, shard_name: str) -> ShardTable:
        """A shard's table; raise UserError if it cannot be read."""
        name = table_name(shard_name)
        if isinstance(self.path, Path):
            return ShardTable(self.path / name)
        try:
            return ShardTable(self.read(name), self.where(name))
        except OSError as error:
            raise UserError(
                f"The index table {self.where(name)} cannot be read: {error}. Run `latentmill "
                "index` again if it is gone."
            ) from None

    def manifest(self) -> dict[str, Any]:
        """The manifest; raise UserError if there is none that this version reads."""
        name = f"{INDEX_DIRECTORY}/{MANIFEST}"
        where = self.where(name)
        again = f"run `latentmill index {self.path}`"
        try:
            manifest = json.loads(self.read(name))
        except FileNotFoundError:
            is_relative = isinstance(self.path, Path) and not self.path.is_absolute()
            here = f"; a relative one counts from {Path.cwd()}" if is_relative else ""
            if isinstance(self.path, Path) and not self.path.exists():
                raise NoIndexError(
                    f"{self.path} does not exist: name the directory that holds `index/`{here}. "
                    "To make one, run `latentmill index` on shards, or `latentmill pack` on a "
                    "folder of pictures."
                ) from None
            raise NoIndexError(
                f"{where} does not exist: {again} (data.path names the directory that holds "
                f"`index/`{here}), or pack a folder of pictures with `latentmill pack folder` "
                "first."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read: {error}.") from None
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        if found != FORMAT_VERSION:
            raise UserError(
                f"{where} has format version {found}, this program reads {FORMAT_VERSION}: {again} "
                "again."
            )
        return manifest


def has_index(path: Path | str) -> bool:
    """Tell whether `path`, a directory or a URL, holds an index."""
    try:
        IndexFiles(path).read(f"{INDEX_DIRECTORY}/{MANIFEST}")
    except OSError:
        return False
    return True


def entry_from_json(entry: dict[str, Any]) -> ShardEntry:
    """Return a shard's entry in the manifest."""
    check_shard_name(entry["name"])
    damage = tuple(Damage(**fault) for fault in entry["damage"])
    return replace(ShardEntry(**entry), damage=damage)


def _entry_to_json(entry: ShardEntry) -> dict[str, Any]:
    """As the first version wrote it, where nothing is left out."""
    fields = asdict(entry)
    return fields if entry.left_out else {k: v for k, v in fields.items() if k != "left_out"}


def make_manifest(
    scanned: Sequence[ScannedShard], split: SplitSpec, root: str, tables: Path, left_out: Counts
) -> dict[str, Any]:
    """The manifest of shards below `root`, whose tables lie in the index in `tables`.

    left_out: counts of files beside the shards.
    """
    entries = [result.entry for result in scanned]
    identity = [[entry.name, entry.bytes, entry.samples, entry.sha256] for entry in entries]
    suffixes: Counter[str] = Counter()
    for result in scanned:
        suffixes.update(result.suffixes)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dataset_id": hashlib.sha256(canonical_json(identity)).hexdigest(),
        "split": split.model_dump(mode="json"),
        "samples": sum(entry.samples for entry in entries),
        "splits": {name: sum(entry.splits[name] for entry in entries) for name in split.names},
        "suffixes": dict(suffixes),
        "shards": [_entry_to_json(entry) for entry in entries],
        "duplicate_keys": _duplicates(scanned, tables),
    }
    if left_out:
        manifest["left_out"] = left_out
    if len(suffixes) > MAX_SUFFIXES:
        del manifest["suffixes"]
    if any(entry.tag is not None for entry in entries):
        manifest["tags_of"] = without_query(root)
    return manifest


def _duplicates(scanned: Sequence[ScannedShard], tables: Path) -> dict[str, Any]:
    """Duplicate keys: how many samples repeat a key, and examples with their shards."""
    hashes = np.sort(np.concatenate([result.key_hashes for result in scanned]))
    repeated = hashes[1:][hashes[1:] == hashes[:-1]]
    if len(repeated) == 0:
        return {"count": 0, "examples": []}
    wanted = np.unique(repeated)[:MAX_DUPLICATES_SHOWN]
    shards_of_key: dict[str, list[str]] = {}
    for result in scanned:
        rows = np.flatnonzero(np.isin(result.key_hashes, wanted))
        if len(rows):
            for key in ShardTable(table_path(tables, result.entry.name)).keys(rows):
                shards_of_key.setdefault(key, []).append(result.entry.name)
    examples = [[key, *shards] for key, shards in sorted(shards_of_key.items()) if len(shards) > 1]
    return {"count": len(repeated), "examples": examples}
