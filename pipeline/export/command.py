"""Taking part in an export: begin, work, and see that nothing is left; and its plan alone.

config -> prepare -> plan stored or compared -> run_worker -> complete? -> finalize
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.common.errors import DONE, PREEMPTED, StoreError, UserError
from pipeline.export.adopt import adopt_plan, compare_plans
from pipeline.export.failures import quarantined, reason_of
from pipeline.export.finalize import finalize
from pipeline.export.layout import FAILURES, ExportDir
from pipeline.export.plan import Plan, find_plan
from pipeline.export.prepare import Prepared, prepare
from pipeline.export.progress import Progress
from pipeline.export.run import MAX_FAILURES_IN_A_ROW, Outcome, run_worker
from pipeline.export.settings import ExportConfig
from pipeline.export.workers import Worker


def begin(config: ExportConfig, worker: Worker) -> tuple[Prepared, str]:
    """Load what the config names and store the plan; every process comes to the same result.

    Returns also what the place guarantees, in words. Raises UserError when something is missing, or
    `config.out` holds an export of something else, or cannot tell finished work from unfinished.
    """
    prepared = _prepare(config, worker)
    plan, guarantee = adopt_plan(prepared.export, prepared.plan)
    return replace(prepared, plan=plan), guarantee


def _prepare(config: ExportConfig, worker: Worker) -> Prepared:
    prepared = prepare(config, worker)
    if not prepared.plan.tasks:
        raise UserError(f"The split {config.data.split!r} holds no sample: set data.split.")
    return prepared


def work_through(prepared: Prepared, worker: Worker, should_stop: Callable[[], bool]) -> int:
    """Do tasks until all are done, finish the export, and return the exit code.

    Raises UserError when tasks are in quarantine, StoreError when data or disks cannot be reached.
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
    finalize(export, plan)
    if worker.rank == 0:
        print(f"export: {plan.rows:,} rows in {export.root}", file=sys.stderr)
    return DONE


def check_complete(export: ExportDir, plan: Plan, outcome: Outcome) -> None:
    """Raise what keeps the export from being finished: UserError, StoreError or a task's own."""
    names = [task.name for task in plan.tasks]
    committed = export.committed(names)
    missing = [name for name in names if name not in committed]
    if not missing:
        return
    resting = quarantined(export, missing)
    untried = len(missing) - len(outcome.errors.keys() | resting)
    given_up = (
        f" {MAX_FAILURES_IN_A_ROW} failures in a row ended this worker, which left {untried} tasks."
        if outcome.gave_up
        else ""
    )
    if resting:
        task, records = next(iter(resting.items()))
        raise UserError(
            f"{len(resting)} of {len(names)} tasks are in quarantine, so the export is not "
            f"finished ({len(committed)} are committed).{given_up} The first, {task}: "
            f"{reason_of(export, records[-1])} Its records lie in {export.store.where(FAILURES)}; "
            "when the cause is mended give the same command with --retry-failed."
        )
    task, error = next(iter(outcome.errors.items()), (missing[0], OSError("nobody has done it")))
    if not isinstance(error, OSError):
        raise error
    raise StoreError(
        f"{len(missing)} of {len(names)} tasks are not done.{given_up} The first, {task}: {error} "
        "The same command goes on where it stopped."
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
    latent_bytes: int  # of all rows, in each format
    each_task_once_by: str


def make_plan(config: ExportConfig, *, is_dry_run: bool = False) -> PlanReport:
    """Write the plan of an export, or find that it is there; raises UserError as `begin` does.

    is_dry_run: write nothing, and do not try what the place guarantees, which takes writing.
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
    )
