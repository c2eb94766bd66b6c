"""Is an export what it says it is? Levels, each with all before it; every problem is listed.

listing     finished; exactly the files of the manifest are there, with their sizes
counts      manifest, plan, commit records and source index agree on rows and files
hashes      every file has the content that was committed
keys        every file's keys, in order, are those of the source shard; formats agree; key index
statistics  recomputed from the stored values, they have the same bits

The source is only read from the level `keys` on, and only if it is given.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from pipeline.errors import UserError
from pipeline.export import statistics
from pipeline.export.audit import audit_task, check_key_index
from pipeline.export.commit import Commit
from pipeline.export.layout import ExportDir, data_path
from pipeline.export.plan import FORMAT, read_plan
from pipeline.export.source import SourceKeys
from pipeline.files import sha256_file
from pipeline.writers import BaseWriter, Writer

Level = Literal["listing", "counts", "hashes", "keys", "statistics"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and everything that is wrong."""

    out: Path
    level: Level
    rows: int
    failed_rows: int
    files: int
    problems: list[str]
    notes: list[str]  # what could not be looked at

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_export(
    out: Path, *, source: Path | None = None, shards: Path | None = None, level: Level = LEVELS[-1]
) -> VerifyReport:
    """Check an export up to `level`.

    source: the directory with the data set's index; None leaves that comparison out. shards: where
    its shards lie, None = in `source`. Raises UserError when there is no export in `out`.
    """
    if level not in LEVELS:
        raise UserError(f"level is {level!r}, but must be one of {', '.join(LEVELS)}.")
    export = ExportDir(out)
    if not (export.plan.exists() or export.manifest.exists()):
        raise UserError(
            f"{out} holds no export: neither manifest.json nor _run/plan.json is there."
        )
    problems = list(_unfinished(export))
    manifest = _read_manifest(export, problems)
    if manifest is None:
        return VerifyReport(out, level, 0, 0, 0, problems, [])
    notes: list[str] = []
    depth = LEVELS.index(level)
    problems += _check_listing(export, manifest)
    if depth >= LEVELS.index("counts"):
        problems += _check_counts(export, manifest)
    if depth >= LEVELS.index("hashes"):
        problems += _check_hashes(export, manifest)
    if depth >= LEVELS.index("keys"):
        keys_of = None if source is None else SourceKeys(source, shards or source)
        if keys_of is None:
            notes.append("no source given: keys were not compared with the source shards")
        problems += _check_content(export, manifest, keys_of, level == "statistics")
    files = len(list(_expected(manifest)))
    return VerifyReport(
        out, level, manifest["rows"], manifest["failed_rows"], files, problems, notes
    )


def _unfinished(export: ExportDir) -> Iterator[str]:
    if export.success.exists():
        return
    state = ""
    if export.plan.exists():
        plan = read_plan(export.plan)
        committed = len(export.committed(task.name for task in plan.tasks))
        state = f": {committed} of {len(plan.tasks)} tasks are committed"
    yield f"unfinished, there is no _SUCCESS{state}; give the export command again"


def _read_manifest(export: ExportDir, problems: list[str]) -> dict[str, Any] | None:
    try:
        data = export.manifest.read_bytes()
        manifest = json.loads(data)
    except FileNotFoundError:
        if export.success.exists():
            problems.append("manifest.json is missing")
        return None
    except ValueError as error:
        problems.append(f"manifest.json is no JSON: {error}")
        return None
    if manifest.get("format") != FORMAT:
        problems.append(f"manifest.json has the format {manifest.get('format')!r}, not {FORMAT!r}")
        return None
    digest = hashlib.sha256(data).hexdigest()
    if export.success.exists() and export.success.read_text(errors="replace") != f"{digest}\n":
        problems.append("_SUCCESS does not hold the hash of manifest.json: one of them was changed")
    return manifest


def _files(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task in manifest["tasks"]:
        yield from task["files"]


def _expected(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, sha256) of all files but the manifest and _SUCCESS."""
    for file in (*_files(manifest), manifest["statistics"], manifest["keys"]):
        yield file["path"], file["sha256"]


def _check_listing(export: ExportDir, manifest: Mapping[str, Any]) -> Iterator[str]:
    expected = {path for path, _ in _expected(manifest)}
    expected |= {export.manifest.name, export.success.name}
    found = {
        path.relative_to(export.root).as_posix(): path.stat().st_size
        for path in sorted(export.root.rglob("*"))
        if path.is_file() and path.relative_to(export.root).parts[0] != "_run"
    }
    yield from (f"{path} is missing" for path in sorted(expected - set(found) - {"_SUCCESS"}))
    yield from (f"{path} is not of this export" for path in sorted(set(found) - expected))
    for file in _files(manifest):
        size = found.get(file["path"], file["bytes"])
        if size != file["bytes"]:
            yield f"{file['path']} has {size} bytes instead of {file['bytes']}"


def _check_counts(export: ExportDir, manifest: Mapping[str, Any]) -> Iterator[str]:
    tasks: list[dict[str, Any]] = manifest["tasks"]
    for total, parts in (
        ("rows", sum(task["rows"] for task in tasks)),
        ("failed_rows", sum(len(task["faults"]) for task in tasks)),
    ):
        if manifest[total] != parts:
            yield f"manifest.json counts {manifest[total]} {total}, its tasks {parts}"
    if not export.plan.exists():
        return
    plan = read_plan(export.plan)
    if [task.name for task in plan.tasks] != [task["name"] for task in tasks]:
        yield "manifest.json lists other tasks than _run/plan.json"
        return
    for task, entry in zip(plan.tasks, tasks, strict=True):
        if task.rows != entry["rows"]:
            yield f"{task.name}: {entry['rows']} rows, but {task.rows} were planned"
        yield from _check_commit(export, entry)


def _check_commit(export: ExportDir, entry: Mapping[str, Any]) -> Iterator[str]:
    name = entry["name"]
    try:
        record = Commit.read(export.commit(name))
    except (OSError, ValueError, TypeError) as error:
        yield f"{name}: its commit record cannot be read ({error})"
        return
    files = [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in record.files]
    committed = (record.rows, record.faults, record.keys_sha256, files)
    if committed != (entry["rows"], entry["faults"], entry["keys_sha256"], entry["files"]):
        yield f"{name}: manifest.json and the commit record differ"


def _check_hashes(export: ExportDir, manifest: Mapping[str, Any]) -> Iterator[str]:
    for path, digest in _expected(manifest):
        file = export.root / path
        if file.exists() and sha256_file(file) != digest:
            yield f"{path} has other content than was committed (sha256)"


def _main_files(task: Mapping[str, Any], writers: Sequence[BaseWriter]) -> list[dict[str, Any]]:
    """Return the file that each writer reads, together with those beside it.

    Fewer than there are writers, if not exactly their files are listed.
    """
    name, found = task["name"], {file["path"]: file for file in task["files"]}
    expected = {data_path(one.kind, name, suffix) for one in writers for suffix in one.suffixes}
    if set(found) != expected:
        return []
    return [found[data_path(writer.kind, name, writer.suffix)] for writer in writers]


def _check_content(
    export: ExportDir,
    manifest: Mapping[str, Any],
    source: SourceKeys | None,
    with_statistics: bool,
) -> Iterator[str]:
    """Read every file; hold one task in memory at a time."""
    formats = manifest["fingerprint"]["output"]["formats"]
    writers: list[BaseWriter] = [TypeAdapter(Writer).validate_python(kind) for kind in formats]
    if source is not None:
        yield from source.differences(manifest["fingerprint"]["data"])
    keys: list[Sequence[str]] = []
    partials: list[statistics.Partial] = []
    for task in manifest["tasks"]:
        files = _main_files(task, writers)
        if len(files) < len(writers):
            yield f"{task['name']}: manifest.json lists other files than its formats have"
            continue
        rows, problems = audit_task(export, {**task, "files": files}, writers, source)
        yield from problems
        if rows is None:
            continue
        keys.append(rows.keys)
        if with_statistics:
            partials.append(statistics.partial_of(rows.latents, rows.valid))
    if len(keys) < len(manifest["tasks"]):
        yield "key index and statistics cannot be recomputed, as files cannot be read"
        return
    yield from check_key_index(export, [task["name"] for task in manifest["tasks"]], keys)
    if with_statistics and export.statistics.exists():
        recomputed = statistics.to_text(statistics.merge(partials))
        if recomputed != export.statistics.read_bytes():
            yield "latent_stats.json differs from the statistics of the stored values"
