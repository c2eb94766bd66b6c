"""Finishes an export whose tasks are all committed; several processes may do so, and repeatedly.

commit records -> publish the rest -> latent_stats.json, keys.parquet -> manifest.json
-> remove `_stage/` -> `_SUCCESS` with the manifest's hash

The plan and the commit records suffice: neither the model nor the data is needed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.export import statistics
from pipeline.export.commit import Commit, Fault, keys_digest, publish_all, read_commits
from pipeline.export.layout import DATA, KEYS, MANIFEST, STAGE, STATISTICS, SUCCESS, ExportDir
from pipeline.export.manifest import ExportManifest, Sidecar, Statistics, TaskEntry, digest
from pipeline.export.plan import ExportPlan, Task
from pipeline.latents.keys import key_hash

TASKS_AT_ONCE = 32  # commit records in memory at a time
KEY_ROW_GROUP = 1 << 16  # rows; a look-up by key reads one group, found by its statistics


def finalize(export: ExportDir, plan: ExportPlan, max_bad_fraction: float | None = None) -> None:
    """Publish, merge, and mark the export as finished; does no harm if it is finished.

    The keys of all rows are in memory, as Arrow arrays. max_bad_fraction: of all rows; None: the
    largest by which a task was judged. Raises UserError if more of them failed.
    """
    if not export.is_finished():
        keys, entries, partials = Keys(), list[TaskEntry](), list[statistics.Partial]()
        judge = Judge(max_bad_fraction)
        published = export.store.sizes(DATA)
        for first in range(0, len(plan.tasks), TASKS_AT_ONCE):
            tasks = plan.tasks[first : first + TASKS_AT_ONCE]
            records = read_commits(export, [task.name for task in tasks])
            publish_all(export, records, published)
            for task, record in zip(tasks, records, strict=True):
                keys.add(record.keys)
                entries.append(_entry(task, record))
                partials.append(statistics.Partial(**record.statistics))
                judge.add(record)
        refusal = judge.refusal()
        if refusal:
            raise UserError(f"{export.root} is not finished: {refusal}")
        _write_results(export, plan, keys, entries, statistics.merge(partials))
    export.store.delete_folder(STAGE)  # a process may have done a task a second time


def _write_results(
    export: ExportDir,
    plan: ExportPlan,
    keys: "Keys",
    entries: list[TaskEntry],
    merged: Mapping[str, Any],
) -> None:
    sidecars = {
        STATISTICS: statistics.to_text(merged),
        KEYS: keys.file([task.name for task in plan.tasks]),
    }
    digests = {name: digest(data) for name, data in sidecars.items()}
    manifest = ExportManifest(
        fingerprint=plan.fingerprint,
        rows=sum(entry.rows for entry in entries),
        failed_rows=sum(len(entry.faults) for entry in entries),
        duplicate_keys=keys.num_duplicates(),
        tasks=entries,
        statistics=Statistics(STATISTICS, digests[STATISTICS], statistics.scaling(merged)),
        keys=Sidecar(KEYS, digests[KEYS]),
    )
    text = manifest.to_text()
    for name, data in (*sidecars.items(), (MANIFEST, text)):
        export.write_file(name, data)
    export.store.delete_folder(STAGE)
    export.write_file(SUCCESS, f"{digest(text)}\n".encode())


class Judge:
    """Whether too many rows of the whole export failed; tasks are judged by themselves before."""

    def __init__(self, max_bad_fraction: float | None = None) -> None:
        self._fraction = max_bad_fraction
        self._known: list[float] = []  # of the records
        self._num_rows = self._num_failed = 0
        self._first: Fault | None = None

    def add(self, record: Commit) -> None:
        """Count the rows of a task."""
        self._num_rows += record.rows
        self._num_failed += len(record.faults)
        self._first = self._first or next(iter(record.faults), None)
        if record.max_bad_fraction is not None:
            self._known.append(record.max_bad_fraction)

    def refusal(self) -> str | None:
        """Return why the export must not be finished, if so.

        The tasks of former versions were judged strictly, each by its own rows.
        """
        allowed = max(self._known, default=1.0) if self._fraction is None else self._fraction
        if self._num_failed <= allowed * self._num_rows:
            return None
        return (
            f"{self._num_failed} of its {self._num_rows} rows failed, more than max_bad_fraction "
            f"= {allowed} allows. The first: {self._first}. Correct the data set and export to "
            "another out; or give the export command with a larger max_bad_fraction, which "
            "encodes nothing again."
        )


class Keys:
    """The keys of all tasks, added in the tasks' order."""

    def __init__(self, keys: Iterable[Sequence[str]] = ()) -> None:
        self._keys: list[Any] = []  # pyarrow arrays, with a third of the memory of Python strings
        self._hashes: list[NDArray[np.uint64]] = []
        for of_task in keys:
            self.add(of_task)

    def add(self, keys: Sequence[str]) -> None:
        """Add a task's keys in the order of its rows."""
        self._keys.append(pa.array(keys, pa.string()))
        self._hashes.append(np.fromiter(map(key_hash, keys), np.uint64, len(keys)))

    @property
    def num_tasks(self) -> int:
        """Number of tasks whose keys were added."""
        return len(self._keys)

    def num_duplicates(self) -> int:
        """Count the rows whose key an earlier row has; the export keeps them."""
        keys = pa.chunked_array(self._keys, pa.string())
        return len(keys) - pc.call_function("count_distinct", [keys]).as_py()

    def index(self, names: Sequence[str]) -> Any:
        """Return the key index of the tasks of these names as a pyarrow.Table.

        Columns: key_hash (sorted), key, shard, position (of the row in the shard's files).
        """
        counts = [len(hashes) for hashes in self._hashes]
        hashes = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        task = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        position = np.arange(len(hashes)) - np.repeat(np.cumsum([0, *counts])[:-1], counts)
        order = np.lexsort((position, task, hashes))
        shard = pa.DictionaryArray.from_arrays(pa.array(task[order]), pa.array(names, pa.string()))
        columns = {
            "key_hash": pa.array(hashes[order]),
            "key": pa.chunked_array(self._keys, pa.string()).take(pa.array(order)),
            "shard": shard,
            "position": pa.array(position[order]),
        }
        return pa.table(columns)

    def file(self, names: Sequence[str]) -> bytes:
        """Return `keys.parquet`."""
        sink = pa.BufferOutputStream()
        options: dict[str, Any] = {"compression": "ZSTD", "use_dictionary": ["shard"]}
        pq.write_table(self.index(names), sink, row_group_size=KEY_ROW_GROUP, **options)
        return sink.getvalue().to_pybytes()


def _entry(task: Task, record: Commit) -> TaskEntry:
    return TaskEntry(
        name=task.name,
        source=task.source,
        source_sha256=task.source_sha256,
        rows=record.rows,
        faults=record.faults,
        keys_sha256=keys_digest(record.keys),
        files=record.files,
        left_out=record.left_out,
    )
