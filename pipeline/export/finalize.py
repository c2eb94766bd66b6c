"""Finish an export whose tasks are all committed; any process may, several at once, again.

commit records -> publish what is not -> latent_stats.json, keys.parquet -> manifest.json
-> remove `_stage/` -> `_SUCCESS` with the manifest's hash
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.export import statistics
from pipeline.export.commit import Commit, publish_commit
from pipeline.export.layout import ExportDir
from pipeline.export.plan import FORMAT, Plan, Task
from pipeline.export.run import keys_digest, remove_stage
from pipeline.files import sha256_file

KEY_ROW_GROUP = 1 << 16  # rows; a look-up by key reads one group, found by its statistics

# The keys of a task's rows, in their order.
KeysOf = Callable[[Task], Sequence[str]]


def finalize(export: ExportDir, plan: Plan, keys_of: KeysOf) -> None:
    """Publish, merge, and mark the export as finished; harmless if it is."""
    if not export.success.exists():
        commits = [Commit.read(export.commit(task.name)) for task in plan.tasks]
        for record in commits:
            publish_commit(export, record)
        keys = [list(keys_of(task)) for task in plan.tasks]
        for task, record, names in zip(plan.tasks, commits, keys, strict=True):
            assert keys_digest(names) == record.keys_sha256, f"keys of {task.name} changed"
        merged = merge_statistics(commits)
        export.place(export.statistics, statistics.to_text(merged))
        export.place(export.keys, key_index_file([task.name for task in plan.tasks], keys))
        manifest = build_manifest(export, plan, commits, num_duplicates(keys))
        export.place(export.manifest, manifest)
        remove_stage(export)
        digest = hashlib.sha256(manifest).hexdigest()
        export.place(export.success, f"{digest}\n".encode())
    remove_stage(export)  # what a process left that did a task a second time


def merge_statistics(commits: Iterable[Commit]) -> dict[str, Any]:
    """Return the statistics over all tasks."""
    return statistics.merge([statistics.Partial(**record.statistics) for record in commits])


def key_hash(key: str) -> int:
    """Return the 64-bit number by which the key index is sorted."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def key_index(names: Sequence[str], keys: Sequence[Sequence[str]]) -> Any:
    """Return the key index of the tasks as a pyarrow.Table.

    Columns: key_hash (sorted), key, shard, position (of the row in the shard's files).
    """
    flat = [key for of_task in keys for key in of_task]
    hashes = np.fromiter((key_hash(key) for key in flat), np.uint64, len(flat))
    task = np.repeat(np.arange(len(keys), dtype=np.int32), [len(of_task) for of_task in keys])
    position = _concatenate([np.arange(len(of_task)) for of_task in keys])
    order = np.lexsort((position, task, hashes))
    shard = pa.DictionaryArray.from_arrays(pa.array(task[order]), pa.array(names, pa.string()))
    columns = {
        "key_hash": pa.array(hashes[order]),
        "key": pa.array(flat, pa.string()).take(pa.array(order)),
        "shard": shard,
        "position": pa.array(position[order]),
    }
    return pa.table(columns)


def key_index_file(names: Sequence[str], keys: Sequence[Sequence[str]]) -> bytes:
    """Return `keys.parquet`."""
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "ZSTD", "use_dictionary": ["shard"]}
    pq.write_table(key_index(names, keys), sink, row_group_size=KEY_ROW_GROUP, **options)
    return sink.getvalue().to_pybytes()


def num_duplicates(keys: Sequence[Sequence[str]]) -> int:
    """Count the keys that occur again; the source is at fault, and the export keeps them all."""
    return sum(map(len, keys)) - len({key for of_task in keys for key in of_task})


def _concatenate(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def build_manifest(
    export: ExportDir, plan: Plan, commits: Sequence[Commit], duplicate_keys: int
) -> bytes:
    """Return `manifest.json`: every file with its hash, every failed row."""
    tasks = [
        {
            "name": task.name,
            "source": task.source,
            "source_sha256": task.source_sha256,
            "rows": record.rows,
            "faults": record.faults,
            "keys_sha256": record.keys_sha256,
            "files": [asdict(file) for file in record.files],
        }
        for task, record in zip(plan.tasks, commits, strict=True)
    ]
    manifest = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "rows": sum(record.rows for record in commits),
        "failed_rows": sum(len(record.faults) for record in commits),
        "duplicate_keys": duplicate_keys,
        "tasks": tasks,
        "statistics": {
            "path": export.statistics.name,
            "sha256": sha256_file(export.statistics),
        },
        "keys": {"path": export.keys.name, "sha256": sha256_file(export.keys)},
    }
    return (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
