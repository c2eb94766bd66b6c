"""The rows of all shards by number: files of one format, opened when needed."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.latents.files import ByteFile, Files, damaged, reported_as_damage
from pipeline.latents.formats import READERS, ShardReader
from pipeline.latents.formats.reading import COLUMNS, Ints, Layout
from pipeline.latents.manifest import LatentManifest, Scale

MAX_OPEN_SHARDS = 128

Columns = dict[str, NDArray[Any]]


class Shards:
    """All files of one format. Raises UserError if one is missing or damaged."""

    def __init__(
        self, files: Files, manifest: LatentManifest, kind: str, scale: Scale | None
    ) -> None:
        """`scale`: normalises latents; None = as stored."""
        self._files, self._scale = files, scale
        self._tasks: list[dict[str, Any]] = manifest.values["tasks"]
        self._kind = kind
        self.layout = Layout(manifest.fields, manifest.latent_shape, manifest.dtype)
        self.first_row: Ints = np.concatenate([[0], np.cumsum(manifest.counts)])
        self._reader = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open)

    def read(self, shard: int, name: str, rows: Ints) -> NDArray[Any]:
        """Return a column, or a field of the latents, of some rows of one shard."""
        reader, where = self._reader(shard)
        with reported_as_damage(where):
            if name in COLUMNS:
                return reader.column(name, rows)
            values = reader.latents(name, rows)
            if self._scale is None:
                return values
            return self._scale.apply(name, values, reader.column("valid", rows))

    def take(self, rows: Ints, names: Sequence[str]) -> Columns:
        """Return columns of rows of the whole export, in the sequence of `rows`."""
        shards = np.searchsorted(self.first_row, rows, side="right") - 1
        columns = {name: self._empty(name, len(rows)) for name in names}
        for shard in np.unique(shards).tolist():
            positions = np.flatnonzero(shards == shard)
            inside = rows[positions] - self.first_row[shard]
            for name, values in columns.items():
                values[positions] = self.read(shard, name, inside)
        return columns

    def _entries(self, shard: int) -> list[dict[str, Any]]:
        """The manifest's entries of a shard's files in this format."""
        folder = f"data/{self._kind}/"
        return [file for file in self._tasks[shard]["files"] if file["path"].startswith(folder)]

    def _open(self, shard: int) -> tuple[ShardReader, str]:
        """Return a shard's reader, and its first file's path for messages."""
        entries = self._entries(shard)
        where = self._files.where(entries[0]["path"])
        files = [self._open_file(entry) for entry in entries]
        with reported_as_damage(where):
            reader = READERS[self._kind](files, self.layout)
        if len(reader) != self._tasks[shard]["rows"]:
            rows = self._tasks[shard]["rows"]
            raise damaged(where, f"has {len(reader)} rows instead of {rows}")
        return reader, where

    def _open_file(self, entry: Mapping[str, Any]) -> ByteFile:
        where = self._files.where(entry["path"])
        try:
            file = self._files.open(entry["path"])
        except FileNotFoundError:
            raise damaged(where, "is missing") from None
        if file.size != entry["bytes"]:
            raise damaged(where, f"has {file.size} bytes instead of {entry['bytes']}")
        return file

    def _empty(self, name: str, num_rows: int) -> NDArray[Any]:
        if name in self.layout.fields:
            dtype = self.layout.array_dtype if self._scale is None else "float32"
            return np.empty((num_rows, *self.layout.shape), dtype)
        return np.empty(num_rows, {"valid": np.bool_, "label": np.int64}.get(name, np.object_))


def choose_format(root: str, manifest: LatentManifest, wanted: str | None) -> str:
    """Return the format to read, the fastest if none is wanted; raise UserError without one."""
    stored = ", ".join(manifest.kinds)
    if wanted is not None and wanted not in manifest.kinds:
        raise UserError(f"{root} holds no {wanted!r} files: its formats are {stored}.")
    readable = [kind for kind in READERS if kind in manifest.kinds and wanted in (None, kind)]
    if not readable:
        raise UserError(f"{root} holds {stored} files; this version reads {', '.join(READERS)}.")
    return readable[0]
