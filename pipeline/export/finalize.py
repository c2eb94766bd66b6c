"""Finish an export whose tasks are all committed; any process may, several at once, again.

commit records -> publish what is not -> latent_stats.json, keys.parquet -> manifest.json
-> remove `_stage/` -> `_SUCCESS` with the manifest's hash

The plan and the commit records say all: neither the model nor the data is needed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.export import statistics
from pipeline.export.commit import Commit, keys_digest, publish_all, read_commits
from pipeline.export.layout import KEYS, MANIFEST, STAGE, STATISTICS, SUCCESS, ExportDir
from pipeline.export.plan import Plan
from pipeline.latents.keys import key_hash
from pipeline.latents.manifest import FORMAT

KEY_ROW_GROUP = 1 << 16  # rows; a look-up by key reads one group, found by its statistics


def finalize(export: ExportDir, plan: Plan) -> None:
    """Publish, merge, and mark the export as finished; harmless if it is."""
    if not export.is_finished():
        commits = read_commits(export, [task.name for task in plan.tasks])
        publish_all(export, commits)
        keys = [record.keys for record in commits]
        merged = merge_statistics(commits)
        sidecars = {
            STATISTICS: statistics.to_text(merged),
            KEYS: key_index_file([task.name for task in plan.tasks], keys),
        }
        manifest = build_manifest(plan, commits, sidecars, statistics.scaling(merged))
        for name, data in (*sidecars.items(), (MANIFEST, manifest)):
            export.place(name, data)
        export.store.delete_folder(STAGE)
        digest = hashlib.sha256(manifest).hexdigest()
        export.place(SUCCESS, f"{digest}\n".encode())
    export.store.delete_folder(STAGE)  # what a process left that did a task a second time


def merge_statistics(commits: Iterable[Commit]) -> dict[str, Any]:
    """Return the statistics over all tasks."""
    return statistics.merge([statistics.Partial(**record.statistics) for record in commits])


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
    plan: Plan,
    commits: Sequence[Commit],
    sidecars: Mapping[str, bytes],
    scaling: Mapping[str, Any],
) -> bytes:
    """Return `manifest.json`: every file with its hash, every failed row, the latents' scaling.

    sidecars: contents of the files beside it, by name.
    """
    tasks = [
        {
            "name": task.name,
            "source": task.source,
            "source_sha256": task.source_sha256,
            "rows": record.rows,
            "faults": record.faults,
            "keys_sha256": keys_digest(record.keys),
            "files": [asdict(file) for file in record.files],
        }
        for task, record in zip(plan.tasks, commits, strict=True)
    ]

    def named(name: str) -> dict[str, str]:
        return {"path": name, "sha256": hashlib.sha256(sidecars[name]).hexdigest()}

    manifest = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "rows": sum(record.rows for record in commits),
        "failed_rows": sum(len(record.faults) for record in commits),
        "duplicate_keys": num_duplicates([record.keys for record in commits]),
        "tasks": tasks,
        "statistics": named(STATISTICS) | {"scaling": scaling},
        "keys": named(KEYS),
    }
    return (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
