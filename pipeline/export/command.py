"""The steps of the export command: begin, do tasks, check that all are done; or only the plan.

config -> prepare -> plan stored or compared -> run_worker -> complete? -> finalize
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pipeline.common.console import in_bytes, listing, plural
from pipeline.common.errors import DONE, PREEMPTED, StoreError, UserError
from pipeline.data.pack.parts import few_shards
from pipeline.export.adopt import compare_plans, store_plan
from pipeline.export.failures import failed_tasks, reason_of
from pipeline.export.finalize import finalize
from pipeline.export.layout import FAILURES, MANIFEST, ExportDir
from pipeline.export.manifest import ExportManifest
from pipeline.export.passthrough import left_out_lines
from pipeline.export.plan import ExportPlan, find_plan
from pipeline.export.prepare import Prepared, prepare
from pipeline.export.progress import Progress
from pipeline.export.run import MAX_FAILURES_IN_A_ROW, WorkerResult, run_worker
from pipeline.export.settings import ExportConfig
from pipeline.export.workers import Worker


def begin(config: ExportConfig, worker: Worker) -> tuple[Prepared, str]:
    """Load what the config names and store the plan; the result is the same on every process.

    Returns also how the store creates a file only once, in words. Raises UserError if something is
    missing, if `config.out` holds another export, or if its store cannot create a file only once.
    """
    prepared = _prepare(config, worker)
    plan, guarantee = store_plan(prepared.export, prepared.plan)
    return replace(prepared, plan=plan), guarantee


def _prepare(config: ExportConfig, worker: Worker) -> Prepared:
    prepared = prepare(config, worker)
    if not prepared.plan.tasks:
        raise UserError(f"The split {config.data.split!r} holds no sample: set data.split.")
    return prepared


def work_through(prepared: Prepared, worker: Worker, should_stop: Callable[[], bool]) -> int:
    """Do tasks until all are done, finish the export, and return the exit code.

    Raises UserError if tasks have failed, StoreError if data or disks cannot be reached.
    """
    export, plan = prepared.export, prepared.plan
    if not export.is_finished():
        progress = Progress(export, plan, enabled=worker.rank == 0)
        outcome = run_worker(
            export, plan, prepared.work, worker=worker, should_stop=should_stop, progress=progress
        )
        if outcome.stopped:
            return PREEMPTED
        progress.report()
        check_complete(export, plan, outcome)
    finalize(export, plan, prepared.work.max_bad_fraction)
    if worker.rank == 0:
        for line in _end(export):
            print(f"export: {line}", file=sys.stderr)
    return DONE


def _end(export: ExportDir) -> Iterator[str]:
    """Yield what the finished export holds, and what it could not keep."""
    manifest = ExportManifest.parse(export.store.read(MANIFEST) or b"")
    yield f"{manifest.rows:,} rows in {export.root}"
    if manifest.failed_rows:
        yield f"{manifest.failed_rows:,} of them cannot be used, zeros in their place"
    yield from left_out_lines(task.left_out for task in manifest.tasks)


def check_complete(export: ExportDir, plan: ExportPlan, outcome: WorkerResult) -> None:
    """Raise the reason why the export is not finished: UserError, StoreError or a task's error."""
    names = [task.name for task in plan.tasks]
    committed = export.committed(names)
    missing = [name for name in names if name not in committed]
    if not missing:
        return
    failed = failed_tasks(export, missing)
    untried = len(missing) - len(outcome.errors.keys() | failed)
    given_up = (
        f" {MAX_FAILURES_IN_A_ROW} failures in a row ended this worker, which left {untried} tasks."
        if outcome.gave_up
        else ""
    )
    if failed:
        task, records = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(names)} tasks have failed, so the export is not finished "
            f"({len(committed)} are committed).{given_up} The first, {task}: "
            f"{reason_of(export, records[-1])} Its records are in {export.store.where(FAILURES)}; "
            "when the cause is fixed, give the same command with --retry-failed."
        )
    task, error = next(iter(outcome.errors.items()), (missing[0], OSError("no worker has done it")))
    if not isinstance(error, OSError):
        raise error
    raise StoreError(
        f"{len(missing)} of {len(names)} tasks are not done.{given_up} The first, {task}: {error} "
        "The same command continues the export."
    ) from error


@dataclass(frozen=True)
class PlanReport:
    """What an export will do."""

    out: str
    tasks: int
    rows: int
    fields: list[str]
    latent_shape: list[int]
    dtype: str
    latent_bytes: int  # of all rows, per format
    each_task_once_by: str
    left_out: list[str]  # what of the shards is no sample, or not whole

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        shape = " x ".join(map(str, self.latent_shape))
        return [
            f"OK  planned: {plural(self.rows, 'row')} in {plural(self.tasks, 'task')}",
            *listing(
                {
                    "out": self.out,
                    "each row": f"{' and '.join(self.fields)}, {shape} of {self.dtype} each",
                    "latents": f"{in_bytes(self.latent_bytes)} in each format",
                    "each task once by": self.each_task_once_by,
                    "left out of the index": self.left_out,
                    "WARN": few_shards(self.tasks, self.rows),
                }
            ),
        ]


def make_plan(config: ExportConfig, *, is_dry_run: bool = False) -> PlanReport:
    """Write the plan of an export, or find that it is there; raises UserError as `begin` does.

    is_dry_run: write nothing, so do not test what the store guarantees, which takes writing.
    """
    if is_dry_run:
        prepared, guarantee = _prepare(config, Worker()), "not tried"
        stored = find_plan(prepared.export)
        if stored is not None:
            compare_plans(prepared.export, stored, prepared.plan)
    else:
        prepared, guarantee = begin(config, Worker())
    plan, output = prepared.plan, prepared.plan.fingerprint["output"]
    item = 4 if config.dtype == "float32" else 2
    row_bytes = len(output["fields"]) * math.prod(output["latent_shape"]) * item
    return PlanReport(
        out=prepared.export.root,
        tasks=len(plan.tasks),
        rows=plan.rows,
        fields=output["fields"],
        latent_shape=output["latent_shape"],
        dtype=config.dtype,
        latent_bytes=plan.rows * row_bytes,
        each_task_once_by=guarantee,
        left_out=prepared.index.left_out_lines(),
    )
