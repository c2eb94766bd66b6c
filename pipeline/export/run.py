"""A worker of an export: its share of the tasks, then what others have not committed.

for each task: rows of the shard -> latents -> stage -> commit -> publish (commit.py)
"""

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.data.rows import RowBatch
from pipeline.export.commit import Commit, commit, drop, publish_commit, stage_rows
from pipeline.export.layout import ExportDir
from pipeline.export.plan import Plan, Task
from pipeline.export.progress import Progress
from pipeline.export.statistics import partial_of, to_json
from pipeline.export.work import Encoder, encode_task
from pipeline.export.workers import Worker
from pipeline.writers import BaseWriter


@dataclass(frozen=True)
class Work:
    """How a task is done."""

    batches: Callable[[Task], Iterable[RowBatch]]
    encoder: Encoder
    writers: Sequence[BaseWriter]
    max_bad_fraction: float


def run_worker(
    export: ExportDir,
    plan: Plan,
    work: Work,
    *,
    worker: Worker,
    should_stop: Callable[[], bool],
    progress: Progress,
) -> bool:
    """Do tasks until all are committed, by whomever; return False if asked to stop before."""
    for task in worker.order(plan.tasks):
        if export.is_committed(task.name):
            continue
        if should_stop():
            return False
        do_task(export, task, work, progress)
    return True


def do_task(export: ExportDir, task: Task, work: Work, progress: Progress) -> bool:
    """Do one task and tell whether this process's commit won."""
    start = time.monotonic()
    rows, faults = encode_task(
        task.name,
        work.batches(task),
        work.encoder,
        max_bad_fraction=work.max_bad_fraction,
        on_rows=progress.advance,
    )
    statistics = to_json(partial_of(rows.latents, rows.valid))
    try:
        staged = stage_rows(export, task.name, rows, work.writers)
    except FileNotFoundError:
        # Another process has finished the export meanwhile, and removed the stage with our part.
        if not export.is_committed(task.name):
            raise
        return False
    record = Commit(
        task=task.name,
        attempt=staged.directory.name,
        rows=len(rows),
        keys_sha256=keys_digest(rows.keys),
        faults=[list(fault) for fault in faults],
        files=list(staged.files),
        statistics=statistics,
        process={
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "seconds": round(time.monotonic() - start, 3),
        },
    )
    won = commit(export, record)
    if won:
        publish_commit(export, record)
    else:
        drop(staged)
    return won


def keys_digest(keys: Sequence[str]) -> str:
    """Return the hash of a shard's keys in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def remove_stage(export: ExportDir) -> None:
    """Remove all unfinished work; for an export whose tasks are all committed and published."""
    shutil.rmtree(export.stage, ignore_errors=True)  # others may be doing the same
