"""Is an export what it says it is? Levels, each with all before it; every problem is listed.

listing     finished; exactly the files of the manifest are there, with their sizes
counts      manifest, plan and commit records agree on rows and files
hashes      every file has the content that was committed
keys        every file's keys, in order, are those of the source shard; formats agree; key index
statistics  recomputed from the stored values, they have the same bits
encode      the run named encodes some batches anew, and gets what is stored (`reencode`)

The source is only read from the level `keys` on, and only if it is given. Files of a store behind a
URL are fetched task by task; no level but the last needs a model.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from pipeline.data.storage.opening import open_writable
from pipeline.errors import UserError
from pipeline.export import statistics
from pipeline.export.audit import audit_task, check_key_index, malformed, unfit
from pipeline.export.commit import Commit, keys_digest
from pipeline.export.finalize import Keys
from pipeline.export.layout import (
    KEYS,
    MANIFEST,
    RUN,
    STATISTICS,
    SUCCESS,
    ExportDir,
    commit_path,
    data_path,
)
from pipeline.export.plan import find_plan
from pipeline.export.source import SourceKeys
from pipeline.files import sha256_file
from pipeline.latents.manifest import FORMAT
from pipeline.writers import BaseWriter, Writer

Level = Literal["listing", "counts", "hashes", "keys", "statistics", "encode"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and everything that is wrong."""

    out: str
    level: Level
    rows: int = 0
    failed_rows: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])  # not looked at, or worth knowing

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_export(
    out: str | Path,
    *,
    source: str | Path | None = None,
    shards: str | Path | None = None,
    level: Level = "statistics",
) -> VerifyReport:
    """Check an export up to `level`, of which `encode` is `reencode.verify_encoding`'s.

    source: the directory with the data set's index; None leaves that comparison out. shards: where
    its shards lie, None = in `source`. Raises UserError when there is no export in `out`.
    """
    if level not in LEVELS:
        raise UserError(f"level is {level!r}, but must be one of {', '.join(LEVELS)}.")
    export = ExportDir(open_writable(out))
    data, plan = export.store.read(MANIFEST), find_plan(export)
    if data is None and plan is None:
        raise UserError(
            f"{out} holds no export: neither manifest.json nor _run/plan.json is there."
        )
    depth = LEVELS.index(level)
    problems = list(_unfinished(export))
    manifest = _parse_manifest(export, data, problems)
    if manifest is None:
        return VerifyReport(export.root, level, problems=problems)
    notes: list[str] = []
    problems += _check_listing(export, manifest)
    if depth >= LEVELS.index("counts"):
        problems += _check_counts(export, manifest)
    if depth >= LEVELS.index("hashes"):
        with ExitStack() as stack:
            keys_of = None
            if source is not None:
                keys_of = stack.enter_context(closing(SourceKeys(source, shards)))
            elif depth >= LEVELS.index("keys"):
                notes.append("no source given: keys were not compared with the source shards")
            problems += _Contents(export, manifest, depth, keys_of).check()
    if depth >= LEVELS.index("keys") and manifest["duplicate_keys"]:
        notes.append(f"{manifest['duplicate_keys']} rows have the key of an earlier one")
    return VerifyReport(
        export.root,
        level,
        rows=manifest["rows"],
        failed_rows=manifest["failed_rows"],
        files=len(list(_expected(manifest))),
        problems=problems,
        notes=notes,
    )


def _unfinished(export: ExportDir) -> Iterator[str]:
    if export.is_finished():
        return
    state, plan = "", find_plan(export)
    if plan is not None:
        committed = len(export.committed(task.name for task in plan.tasks))
        state = f": {committed} of {len(plan.tasks)} tasks are committed"
    yield f"unfinished, there is no _SUCCESS{state}; give the export command again"


def _parse_manifest(
    export: ExportDir, data: bytes | None, problems: list[str]
) -> dict[str, Any] | None:
    seal = export.store.read(SUCCESS)
    if data is None:
        if seal is not None:
            problems.append("manifest.json is missing")
        return None
    try:
        manifest = json.loads(data)
    except ValueError as error:
        problems.append(f"manifest.json is no JSON: {error}")
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        problems.append(f"manifest.json is not of the format {FORMAT!r}")
        return None
    digest = hashlib.sha256(data).hexdigest()
    if seal is not None and seal.decode(errors="replace") != f"{digest}\n":
        problems.append("_SUCCESS does not hold the hash of manifest.json: one of them was changed")
    lacking = malformed(manifest)
    if lacking is not None:
        problems.append(f"manifest.json is not what an export writes: {lacking}")
        return None
    return manifest


def _files(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task in manifest["tasks"]:
        yield from task["files"]


def _expected(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, sha256) of all files but the manifest and _SUCCESS."""
    for file in (*_files(manifest), manifest["statistics"], manifest["keys"]):
        yield file["path"], file["sha256"]


def _check_listing(export: ExportDir, manifest: Mapping[str, Any]) -> Iterator[str]:
    expected = {path for path, _ in _expected(manifest)} | {MANIFEST, SUCCESS}
    sizes = export.store.sizes()
    found = {name: size for name, size in sizes.items() if name.partition("/")[0] != RUN}
    yield from (f"{path} is missing" for path in sorted(expected - set(found) - {SUCCESS}))
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
    plan = find_plan(export)
    if plan is None:
        return
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
        record = Commit.parse(export.store.read(commit_path(name)) or b"")
    except (ValueError, TypeError, KeyError) as error:
        yield f"{name}: its commit record cannot be read ({error})"
        return
    files = [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in record.files]
    committed = (record.rows, record.faults, keys_digest(record.keys), files)
    if committed != (entry["rows"], entry["faults"], entry["keys_sha256"], entry["files"]):
        yield f"{name}: manifest.json and the commit record differ"


def _main_files(task: Mapping[str, Any], writers: Sequence[BaseWriter]) -> list[dict[str, Any]]:
    """Return the file that each writer reads, together with those beside it.

    Fewer than there are writers, if not exactly their files are listed.
    """
    name, found = task["name"], {file["path"]: file for file in task["files"]}
    expected = {data_path(one.kind, name, suffix) for one in writers for suffix in one.suffixes}
    if set(found) != expected:
        return []
    return [found[data_path(writer.kind, name, writer.suffix)] for writer in writers]


class _Contents:
    """Reads every file once, and holds one task in memory at a time."""

    def __init__(
        self,
        export: ExportDir,
        manifest: Mapping[str, Any],
        depth: int,
        source: SourceKeys | None,
    ) -> None:
        self._export, self._manifest, self._source = export, manifest, source
        self._with_keys = depth >= LEVELS.index("keys")
        self._with_statistics = depth >= LEVELS.index("statistics")
        formats = manifest["fingerprint"]["output"]["formats"]
        self._writers: Sequence[BaseWriter] = TypeAdapter(list[Writer]).validate_python(formats)
        self._keys = Keys()
        self._partials: list[statistics.Partial] = []

    def check(self) -> Iterator[str]:
        """Yield all problems."""
        manifest = self._manifest
        if self._source is not None and self._with_keys:
            yield from self._source.differences(manifest["fingerprint"]["data"])
            yield from self._source.left_out(manifest["tasks"])
        for task in manifest["tasks"]:
            with self._export.store.local_copy([file["path"] for file in task["files"]]) as root:
                yield from self._check_hashes(root, task)
                if self._with_keys:
                    yield from self._check_rows(root, task)
        sidecars = {name: self._export.store.read(name) for name in (STATISTICS, KEYS)}
        for entry in (manifest["statistics"], manifest["keys"]):
            data = sidecars.get(entry["path"])
            if data is not None and hashlib.sha256(data).hexdigest() != entry["sha256"]:
                yield _other_content(entry["path"])
        if self._with_keys:
            yield from self._check_sidecars(sidecars[STATISTICS], sidecars[KEYS])

    def _check_hashes(self, root: Path, task: Mapping[str, Any]) -> Iterator[str]:
        for file in task["files"]:
            path = root / file["path"]
            if path.exists() and sha256_file(path) != file["sha256"]:
                yield _other_content(file["path"])

    def _check_rows(self, root: Path, task: Mapping[str, Any]) -> Iterator[str]:
        files = _main_files(task, self._writers)
        if len(files) < len(self._writers):
            yield f"{task['name']}: manifest.json lists other files than its formats have"
            return
        output, listed = self._manifest["fingerprint"]["output"], {**task, "files": files}
        rows, problems = audit_task(root, listed, output, self._writers, self._source)
        yield from problems
        if rows is None:
            return
        self._keys.add(rows.keys)
        if self._with_statistics and not any(unfit(rows, output)):
            partial = statistics.partial_of(rows.latents, rows.valid, task["faults"])
            self._partials.append(partial)

    def _check_sidecars(self, stored: bytes | None, index: bytes | None) -> Iterator[str]:
        names = [task["name"] for task in self._manifest["tasks"]]
        if self._keys.num_tasks < len(names):
            yield "key index and statistics cannot be recomputed, as files cannot be read"
            return
        duplicates, counted = self._keys.num_duplicates(), self._manifest["duplicate_keys"]
        if duplicates != counted:
            yield f"manifest.json counts {counted} duplicate keys, but the files hold {duplicates}"
        if index is not None:
            yield from check_key_index(index, names, self._keys)
        if self._with_statistics and stored is not None:
            merged = statistics.merge(self._partials)
            if statistics.to_text(merged) != stored:
                yield f"{STATISTICS} differs from the statistics of the stored values"
            scaling = statistics.scaling(merged)  # which older manifests do not hold
            if self._manifest["statistics"].get("scaling", scaling) != scaling:
                yield f"{MANIFEST} holds another scaling than that of the stored values"


def _other_content(path: str) -> str:
    return f"{path} has other content than was committed (sha256)"
