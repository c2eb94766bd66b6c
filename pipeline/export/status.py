"""Status of an export from its files: no worker has to run, no model is loaded.

listings of commits, failures and stages, and the commit records -> StatusReport
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.common.console import in_bytes, listing, names, plural
from pipeline.common.errors import UserError
from pipeline.data.storage.opening import open_writable
from pipeline.export.commit import Commit, publish_all, read_commits, remove_unused_stages
from pipeline.export.failures import failed_tasks, reason_of
from pipeline.export.finalize import Judge, finalize
from pipeline.export.layout import DATA, FAILURES, STAGE, ExportDir, flat_name
from pipeline.export.passthrough import left_out_lines
from pipeline.export.plan import read_plan


@dataclass(frozen=True)
class StatusReport:
    """The progress of an export."""

    out: str
    finished: bool  # it has _SUCCESS and can be read
    tasks: int
    committed_tasks: int
    rows: int  # of all tasks
    committed_rows: int
    failed_rows: int  # committed rows that are not valid
    committed_bytes: int
    failed_attempts: int
    quarantined: dict[str, str]  # failed task -> reason
    staged_tasks: list[str]  # tasks that are being written, or whose write was killed
    rows_per_process_second: float | None  # over the committed tasks
    refusal: str | None  # why it is not finished although all tasks are committed
    left_out: list[str]  # labels and texts that the columns do not hold, by reason

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        done = f"{self.committed_tasks:,} of {plural(self.tasks, 'task')} committed"
        if self.finished:
            verdict = f"OK  finished: {plural(self.rows, 'row')} in {plural(self.tasks, 'task')}"
        elif self.quarantined:
            verdict = f"FAILED  {plural(len(self.quarantined), 'task')} failed, {done}"
        elif self.refusal:
            verdict = f"FAILED  {done}, but {self.refusal}"
        elif self.committed_tasks == self.tasks:
            verdict = f"UNFINISHED  {done}: latentmill export finalize {self.out}"
        else:
            verdict = f"UNFINISHED  {done}: the export command goes on where it stopped"
        rows = f"{self.committed_rows:,} of {plural(self.rows, 'row')}"
        rate, failed = self.rows_per_process_second, self.failed_rows
        return [
            verdict,
            *listing(
                {
                    "out": self.out,
                    "committed": f"{rows}, {in_bytes(self.committed_bytes)}",
                    "rows that cannot be used": f"{failed:,}, zeros in their place" * bool(failed),
                    "not in the columns": self.left_out,
                    "rate": None if rate is None else f"{rate:,.1f} rows/s in each process",
                    "failed attempts": self.failed_attempts or None,
                    "failed tasks": [f"{task}: {why}" for task, why in self.quarantined.items()],
                    "begun, not committed": names(self.staged_tasks),
                }
            ),
        ]


def export_status(out: str) -> StatusReport:
    """Return the status of an export; raises UserError if there is none."""
    export = ExportDir(open_writable(out))
    plan = read_plan(export)
    names = [task.name for task in plan.tasks]
    committed = export.committed(names)
    records = read_commits(export, [name for name in names if name in committed])
    waiting = [name for name in names if name not in committed]
    failures = failed_tasks(export, waiting)
    finished, judge = export.is_finished(), Judge()
    for record in records:
        judge.add(record)
    return StatusReport(
        out=export.root,
        finished=finished,
        tasks=len(names),
        committed_tasks=len(records),
        rows=plan.rows,
        committed_rows=sum(record.rows for record in records),
        failed_rows=sum(len(record.faults) for record in records),
        committed_bytes=sum(file.bytes for record in records for file in record.files),
        failed_attempts=len(export.store.sizes(FAILURES)),
        quarantined={task: reason_of(export, found[-1]) for task, found in failures.items()},
        staged_tasks=_staged(export, waiting),
        rows_per_process_second=_rate(records),
        refusal=None if waiting or finished else judge.refusal(),
        left_out=left_out_lines(record.left_out for record in records),
    )


def _staged(export: ExportDir, tasks: Iterable[str]) -> list[str]:
    folders = {PurePosixPath(name).parts[1] for name in export.store.sizes(STAGE)}
    in_work = {folder.rpartition(".")[0] for folder in folders}
    return [task for task in tasks if flat_name(task) in in_work]


def _rate(records: Collection[Commit]) -> float | None:
    seconds = sum(float(record.process["seconds"]) for record in records)
    return round(sum(record.rows for record in records) / seconds, 1) if seconds else None


@dataclass(frozen=True)
class FinalizeReport:
    """An export that is finished."""

    out: str
    tasks: int
    rows: int

    def lines(self) -> list[str]:
        """Return the report for a person."""
        rows = f"{plural(self.rows, 'row')} in {plural(self.tasks, 'task')}"
        return [f"OK  finished: {rows}, in {self.out}"]


def finalize_export(out: str) -> FinalizeReport:
    """Finish an export whose tasks are all committed; raises UserError if they are not."""
    export = ExportDir(open_writable(out))
    plan = read_plan(export)
    names = [task.name for task in plan.tasks]
    missing = sorted(set(names) - export.committed(names))
    if missing and not export.is_finished():
        raise UserError(
            f"{export.root} cannot be finished: {len(missing)} of its {len(names)} tasks are not "
            f"committed, such as {missing[0]}. Give the export command again; `latentmill export "
            f"status {export.root}` says why."
        )
    finalize(export, plan)
    return FinalizeReport(export.root, len(names), plan.rows)


@dataclass(frozen=True)
class GarbageReport:
    """What was removed."""

    out: str
    removed_files: int
    removed_bytes: int

    def lines(self) -> list[str]:
        """Return the report for a person."""
        files = f"{plural(self.removed_files, 'file')}, {in_bytes(self.removed_bytes)}"
        return [f"OK  removed {files}, from {self.out}"]


def collect_garbage(out: str) -> GarbageReport:
    """Remove files that unused attempts at committed tasks left; safe while workers run."""
    export = ExportDir(open_writable(out))
    plan = read_plan(export)
    names = [task.name for task in plan.tasks]
    committed = export.committed(names)
    records = read_commits(export, [name for name in names if name in committed])
    if not export.is_finished():
        publish_all(export, records, export.store.sizes(DATA))
    return GarbageReport(export.root, *remove_unused_stages(export, committed))
