"""The source side of `verify`: reads the keys from the source shards."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.data.index import Index
from pipeline.data.index.one_pass import OnePass
from pipeline.data.index.split_rows import SHARDS, identity_of_shards
from pipeline.data.index.splits import ALL
from pipeline.data.index.tar import group_samples
from pipeline.data.index.tar_scan import ReadBytes, TarScan
from pipeline.data.storage import is_url, open_storage
from pipeline.export.manifest import FingerprintData, TaskEntry
from pipeline.latents.formats.writers import Rows


class SourceKeys:
    """The data set that an export was made from."""

    def __init__(self, path: str | Path, shards: str | Path | None = None) -> None:
        """Open the index in `path`. shards: their directory; None: `path`."""
        self._index = Index.open(path)
        self._storage = open_storage(shards or path)
        self._number = {shard.name: i for i, shard in enumerate(self._index.shards)}
        self._split = ALL
        self._shards: str | None = None  # identity of the shards of a pattern
        # The files of a task are checked one after the other: their shard is read once.
        self._keys = lru_cache(maxsize=1)(self._keys_in)

    def differences(self, data: FingerprintData) -> Iterator[str]:
        """Yield why the data set is not the one that was exported."""
        self._split = data.split.partition("/")[0]
        if self._split.startswith(SHARDS):  # whole shards, which `left_out` compares
            self._shards, self._split = data.split, ALL
        if self._index.dataset_id != data.dataset_id:
            yield f"the source {self._index.path} is another data set (dataset_id)"
        elif self._split != ALL and self._split not in self._index.split_spec.names:
            yield f"the source {self._index.path} has no split {self._split}"
        elif self._shards is None and self._index.split_identity(self._split) != data.split:
            yield f"the source {self._index.path} is split by another rule now"

    def left_out(self, tasks: Sequence[TaskEntry]) -> Iterator[str]:
        """Yield the shards with rows and without a task."""
        sources = {task.source for task in tasks}
        if self._shards is not None:
            if identity_of_shards(sources) != self._shards:
                yield "the tasks are not those of the shards that data.split named"
            return
        counts = np.asarray(self._index.counts(self._split)).tolist()
        for shard, rows in zip(self._index.shards, counts, strict=True):
            if rows and shard.name not in sources:
                where = self._storage.where(shard.name)
                yield f"{where} has {rows} rows of split {self._split}, but no task"

    def check(self, task: TaskEntry, rows: Rows) -> Iterator[str]:
        """Yield how the rows of a file differ from its source shard."""
        number, keys = self._number.get(task.source), self._keys(task.source)
        if number is None or keys is None:
            where = self._storage.where(task.source)
            yield f"its source shard {where} is missing; if elsewhere, give its place by --shards"
            return
        table = self._index.table(number)
        expected = table.rows_of(self._index.split_number(self._split))
        if rows.rows.tolist() != expected.tolist():
            yield f"not the rows of split {self._split} of {task.source}, in order"
        if list(rows.keys) != [keys[row] for row in rows.rows if row < len(keys)]:
            yield f"other keys, or in another order, than {self._storage.where(task.source)}"

    def _keys_in(self, name: str) -> list[str] | None:
        """Return the keys of all samples in a shard; None if it is missing.

        A remote shard is read whole, in large pieces; of a local one only the headers.
        """
        state = self._storage.states([name])[name]
        if state is None:
            return None

        def read(offset: int, num_bytes: int) -> bytes:
            return self._storage.read(name, offset, min(num_bytes, state.num_bytes - offset))

        def scan(read: ReadBytes) -> list[str]:
            return [sample.key for sample in group_samples(TarScan(read, state.num_bytes))]

        if not is_url(self._storage.root):
            return scan(read)
        with OnePass(self._storage, name, state.num_bytes) as bytes_of:
            return scan(bytes_of.read)

    def close(self) -> None:
        """Close the storage of the shards."""
        self._storage.close()
