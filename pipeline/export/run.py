"""A worker of an export: does its share of the tasks, then those that are not committed.

    tasks -> read_shards (threads: bytes, pixels) -> this thread: latents
          -> a thread: statistics, stage -> commit -> publish (commit.py)

The three stages work at the same time, on consecutive tasks. A task that fails is tried again
after the others; see `failures`. Three failures in a row end the worker: then the disk, the device
or a setting is the cause, not the tasks.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import torch

from pipeline.common.errors import UserError
from pipeline.data.sequential import RowBatch
from pipeline.export.commit import Commit, Fault, commit, drop, publish_commit, stage_rows
from pipeline.export.failures import (
    MAX_ATTEMPTS,
    RejectedError,
    failed_tasks,
    is_unwritable,
    record_failure,
)
from pipeline.export.layout import ExportDir
from pipeline.export.passthrough import left_out
from pipeline.export.plan import ExportPlan, Task
from pipeline.export.progress import Progress
from pipeline.export.statistics import partial_of, to_json
from pipeline.export.work import Encoding, encode_task
from pipeline.export.workers import Worker
from pipeline.latents.formats.writers import BaseWriter, Rows

MAX_FAILURES_IN_A_ROW = 3
WRITE_BEHIND = 1  # tasks that wait to be written while the next is encoded

Shards = Generator[tuple[int, Iterator[RowBatch]]]


@dataclass(frozen=True)
class Work:
    """What every task needs."""

    read: Callable[[Iterable[int]], Shards]  # numbers of shards -> their rows
    encoder: Encoding
    writers: Sequence[BaseWriter]
    max_bad_fraction: float


class StoppedError(Exception):
    """A signal asked this worker to end."""


@dataclass
class WorkerResult:
    """How a worker ended; `errors`: of tasks that it could not do."""

    stopped: bool = False
    gave_up: bool = False  # after MAX_FAILURES_IN_A_ROW
    errors: dict[str, Exception] = field(default_factory=dict[str, Exception])


def run_worker(
    export: ExportDir,
    plan: ExportPlan,
    work: Work,
    *,
    worker: Worker,
    should_stop: Callable[[], bool],
    progress: Progress,
) -> WorkerResult:
    """Do tasks until all are committed, by any worker, or have failed, or a stop is asked for."""
    run = _Run(export, work, should_stop, progress)
    tasks = worker.task_queue(plan.tasks)
    for _ in range(MAX_ATTEMPTS):
        run.outcome.errors.clear()
        run.work_through(tasks)
        if run.outcome.stopped or run.outcome.gave_up or not run.outcome.errors:
            break
    return run.outcome


class _Run:
    """State of a running worker."""

    def __init__(
        self, export: ExportDir, work: Work, should_stop: Callable[[], bool], progress: Progress
    ) -> None:
        self.outcome = WorkerResult()
        self._num_in_a_row = 0
        self._broken: Exception | None = None  # what kept the next task from being chosen
        self._export, self._work, self._progress = export, work, progress
        self._should_stop = should_stop

    def work_through(self, tasks: Sequence[Task]) -> None:
        """Do each task that is not committed, once."""
        by_shard = {task.shard: task for task in tasks}
        with (
            ThreadPoolExecutor(1, thread_name_prefix="export-write") as writer,
            closing(self._work.read(self._to_do(tasks))) as shards,
        ):
            writing: deque[tuple[Task, Future[bool]]] = deque()
            for shard, batches in shards:
                task, start = by_shard[shard], time.monotonic()
                try:
                    rows, faults = self._encode(task, batches)
                except StoppedError:
                    self.outcome.stopped = True
                    break
                except Exception as error:  # noqa: BLE001 - handled by `_record_error`
                    while writing:  # first, as failures in a row are counted in order
                        self._finish_write(*writing.popleft())
                    self._record_error(task, error)
                    continue
                seconds = time.monotonic() - start
                if len(writing) > WRITE_BEHIND:
                    self._finish_write(*writing.popleft())
                job = (self._export, task.name, rows, faults, self._work, seconds)
                writing.append((task, writer.submit(commit_rows, *job)))
            while writing:
                self._finish_write(*writing.popleft())
        if self._broken is not None:
            raise self._broken

    def _to_do(self, tasks: Sequence[Task]) -> Iterator[int]:
        """Yield the shards of tasks that are not done, when each is about to be read.

        It runs inside the reader, whose errors count as errors of a task: so its own errors are
        kept and raised later.
        """
        try:
            names = [task.name for task in tasks]
            skipped = self._export.committed(names) | set(failed_tasks(self._export, names))
            for task in tasks:
                if self.outcome.gave_up:
                    return
                if task.name in skipped or self._export.is_committed(task.name):
                    continue
                yield task.shard
        except Exception as error:  # noqa: BLE001 - raised at the end of `work_through`
            self._broken = error

    def _encode(self, task: Task, batches: Iterable[RowBatch]) -> tuple[Rows, list[Fault]]:
        def unless_stopped() -> Iterator[RowBatch]:
            for batch in batches:
                if self._should_stop():
                    raise StoppedError
                yield batch

        rows, faults = encode_task(
            task.name,
            unless_stopped(),
            self._work.encoder,
            max_bad_fraction=self._work.max_bad_fraction,
            on_rows=self._progress.advance,
        )
        assert len(rows) == task.rows, "the plan and the reader know the same index"
        return rows, faults

    def _finish_write(self, task: Task, written: "Future[bool]") -> None:
        """Wait until a task is written, and record an error."""
        try:
            written.result()
        except Exception as error:  # noqa: BLE001 - as above
            self._record_error(task, error)
        else:
            self._num_in_a_row = 0

    def _record_error(self, task: Task, error: Exception) -> None:
        """Keep a task's error for later; raise it if it ends the worker."""
        is_rejected = isinstance(error, RejectedError)
        if is_unwritable(error) or (isinstance(error, UserError) and not is_rejected):
            raise error
        self.outcome.errors[task.name] = error
        if not is_infrastructure(error):
            record_failure(self._export, task.name, error)
        if not is_rejected:  # rejected data are not the worker's fault
            self._num_in_a_row += 1
            self.outcome.gave_up |= self._num_in_a_row >= MAX_FAILURES_IN_A_ROW


def is_infrastructure(error: BaseException) -> bool:
    """Return whether an error is not the task's: a retry, or another machine, may succeed."""
    return isinstance(
        error, OSError | MemoryError | torch.AcceleratorError | torch.OutOfMemoryError
    )


def commit_rows(
    export: ExportDir,
    task: str,
    rows: Rows,
    faults: Sequence[Fault],
    work: Work,
    seconds: float,
) -> bool:
    """Write a task's rows and commit them; return False if another process was first.

    seconds: of reading, decoding and encoding, for the record.
    """
    statistics = to_json(partial_of(rows.latents, rows.valid, faults))
    try:
        staged = stage_rows(export, task, rows, work.writers)
    except FileNotFoundError:
        # Another process has finished the export meanwhile, and removed `_stage/`.
        if not export.is_committed(task):
            raise
        return False
    record = Commit(
        task=task,
        attempt=staged.attempt,
        keys=list(rows.keys),
        faults=list(faults),
        files=list(staged.files),
        statistics=statistics,
        process={
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "seconds": round(seconds, 3),
        },
        left_out=left_out(rows),
        max_bad_fraction=work.max_bad_fraction,
    )
    try:
        won = commit(export, record)
    except OSError as error:
        # On a full disk, free the space. After other errors the record may exist nevertheless.
        if is_unwritable(error) and not export.is_committed(task):
            drop(export, staged)
        raise
    if won:
        publish_commit(export, record)
    else:
        drop(export, staged)
    return won
