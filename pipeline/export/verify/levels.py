"""Verifies an export in levels, each of which includes those before it; lists every problem.

listing     finished; exactly the files of the manifest are there, with their sizes
counts      manifest, plan and commit records agree on rows and files
hashes      every file has the content that was committed
keys        every file has the keys of the source shard, in order; it is read alike by the format's
            own reader and by LatentDataset; formats agree; key index
statistics  recomputed from the stored values, they have the same bits
encode      a given model encodes some tasks again, and gives the stored latents (`reencode`)

The source is read from the level `keys` on, if it is given. Files at a URL are fetched task by
task. Only the last level needs a model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pipeline.common.console import listing, plural
from pipeline.common.errors import UserError
from pipeline.data.storage.opening import open_writable
from pipeline.export.commit import Commit, keys_digest
from pipeline.export.layout import MANIFEST, RUN, SUCCESS, ExportDir, commit_path
from pipeline.export.manifest import ExportManifest, TaskEntry, digest
from pipeline.export.passthrough import left_out_lines
from pipeline.export.plan import ExportPlan, find_plan
from pipeline.export.verify import readers
from pipeline.export.verify.audit import Audit
from pipeline.export.verify.source import SourceKeys

Level = Literal["listing", "counts", "hashes", "keys", "statistics", "encode"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and all problems."""

    out: str
    level: Level
    rows: int = 0
    failed_rows: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])  # what was not checked, and other remarks

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        files, rows = plural(self.files, "file"), plural(self.rows, "row")
        if not self.ok:
            verdict = f"FAILED  {plural(len(self.problems), 'problem')}"
        elif LEVELS.index(self.level) < LEVELS.index("keys"):
            verdict = f"OK  {files} of {rows}, as far as level {self.level} looks"
        else:
            verdict = f"OK  {rows}, each exactly once, {files}"
        failed = f"{self.failed_rows:,}, zeros in their place" * bool(self.failed_rows)
        return [
            verdict,
            *listing(
                {
                    "export": self.out,
                    "level": self.level,
                    "rows that cannot be used": failed,
                    "problems": self.problems,
                    "notes": self.notes,
                }
            ),
        ]


def verify_export(
    out: str | Path,
    *,
    source: str | Path | None = None,
    shards: str | Path | None = None,
    level: Level = "statistics",
) -> VerifyReport:
    """Check an export up to `level`; for `encode` see `reencode.verify_with_run`.

    source: the directory with the data set's index; None: no comparison with it. shards: directory
    of its shards; None: `source`. Raises UserError if there is no export in `out`.
    """
    if level not in LEVELS:
        raise UserError(f"level is {level!r}, but must be one of {', '.join(LEVELS)}.")
    export = ExportDir(open_writable(out))
    data, problems = export.store.read(MANIFEST), list[str]()
    plan = _find_plan(export, problems)
    if data is None and plan is None and not problems:
        raise UserError(
            f"{out} holds no export: neither manifest.json nor _run/plan.json is there."
        )
    depth = LEVELS.index(level)
    problems += _unfinished(export, plan)
    manifest = _parse_manifest(export, data, problems)
    if manifest is None:
        return VerifyReport(export.root, level, problems=problems)
    notes: list[str] = []
    problems += _check_listing(export, manifest)
    if depth >= LEVELS.index("counts"):
        problems += _check_counts(export, manifest, plan)
    with_rows = depth >= LEVELS.index("keys")
    kinds = {writer.kind for writer in manifest.output.formats}
    if depth >= LEVELS.index("hashes"):
        with ExitStack() as stack:
            keys_of = None
            if source is not None:
                keys_of = stack.enter_context(closing(SourceKeys(source, shards)))
            elif with_rows:
                notes.append("no source given: keys were not compared with the source shards")
            with_statistics = depth >= LEVELS.index("statistics")
            audit = Audit(
                export, manifest, rows=with_rows, statistics=with_statistics, source=keys_of
            )
            problems += audit.problems()
    if with_rows and manifest.duplicate_keys:
        notes.append(f"{manifest.duplicate_keys} rows have the key of an earlier one")
    if with_rows and "safetensors" in kinds and readers.library_is_missing():
        notes.append("the safetensors library is not installed here: its files were read without")
    notes += left_out_lines(task.left_out for task in manifest.tasks)
    return VerifyReport(
        export.root,
        level,
        rows=manifest.rows,
        failed_rows=manifest.failed_rows,
        files=len(list(manifest.files())),
        problems=problems,
        notes=notes,
    )


def _find_plan(export: ExportDir, problems: list[str]) -> ExportPlan | None:
    try:
        return find_plan(export)
    except UserError as error:
        problems.append(str(error))
        return None


def _unfinished(export: ExportDir, plan: ExportPlan | None) -> Iterator[str]:
    if export.is_finished():
        return
    state = ""
    if plan is not None:
        committed = len(export.committed(task.name for task in plan.tasks))
        state = f": {committed} of {len(plan.tasks)} tasks are committed"
    yield f"unfinished, there is no _SUCCESS{state}; give the export command again"


def _parse_manifest(
    export: ExportDir, data: bytes | None, problems: list[str]
) -> ExportManifest | None:
    success = export.store.read(SUCCESS)
    if data is None:
        if success is not None:
            problems.append("manifest.json is missing")
        return None
    try:
        manifest = ExportManifest.parse(data)
    except ValueError as error:
        problems.append(f"manifest.json {error}")
        return None
    if success is not None and success.decode(errors="replace") != f"{digest(data)}\n":
        problems.append("_SUCCESS does not hold the hash of manifest.json: one of them was changed")
    return manifest


def _check_listing(export: ExportDir, manifest: ExportManifest) -> Iterator[str]:
    expected = {file.path for file in manifest.files()} | {MANIFEST, SUCCESS}
    sizes = export.store.sizes()
    found = {name: size for name, size in sizes.items() if name.partition("/")[0] != RUN}
    yield from (f"{path} is missing" for path in sorted(expected - set(found) - {SUCCESS}))
    yield from (f"{path} is not of this export" for path in sorted(set(found) - expected))
    for task in manifest.tasks:
        for file in task.files:
            size = found.get(file.path, file.bytes)
            if size != file.bytes:
                yield f"{file.path} has {size} bytes instead of {file.bytes}"


def _check_counts(
    export: ExportDir, manifest: ExportManifest, plan: ExportPlan | None
) -> Iterator[str]:
    tasks = manifest.tasks
    for name, total, parts in (
        ("rows", manifest.rows, sum(task.rows for task in tasks)),
        ("failed_rows", manifest.failed_rows, sum(len(task.faults) for task in tasks)),
    ):
        if total != parts:
            yield f"manifest.json counts {total} {name}, its tasks {parts}"
    if plan is None:
        return
    if [task.name for task in plan.tasks] != [entry.name for entry in tasks]:
        yield "manifest.json lists other tasks than _run/plan.json"
        return
    for task, entry in zip(plan.tasks, tasks, strict=True):
        if task.rows != entry.rows:
            yield f"{task.name}: {entry.rows} rows, but {task.rows} were planned"
        yield from _check_commit(export, entry)


def _check_commit(export: ExportDir, entry: TaskEntry) -> Iterator[str]:
    name = entry.name
    try:
        record = Commit.parse(export.store.read(commit_path(name)) or b"")
    except (ValueError, TypeError, KeyError) as error:
        yield f"{name}: its commit record cannot be read ({error})"
        return
    committed = (record.rows, record.faults, keys_digest(record.keys), record.files)
    listed = (entry.rows, entry.faults, entry.keys_sha256, entry.files)
    if (*committed, record.left_out) != (*listed, entry.left_out):
        yield f"{name}: manifest.json and the commit record differ"
