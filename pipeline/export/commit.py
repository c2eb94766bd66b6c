"""The commit protocol: safe against SIGKILL at every instruction, with any number of processes.

1. stage    all files of a task under a unique name in `_stage/`, flushed (uploaded) and hashed
2. commit   create `_run/commits/<task>.json`, which fails if it exists: this step is atomic. If
            several processes do the same task, one wins, the others remove their stage
3. publish  move the winner's files to their final names; any process that finds a commit record
            without its files finishes the move

Killed before 2: the files in `_stage/` are useless, the task is done again. Killed between 2 and 3
or during 3: the next process publishes. There are no locks, no timeouts and no clocks.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import sha256_file
from pipeline.data.storage.threads import map_in_threads
from pipeline.export.layout import (
    STAGE,
    ExportDir,
    commit_path,
    data_path,
    flat_name,
    new_id,
)
from pipeline.latents.formats.writers import BaseWriter, Rows

Fault = tuple[int, str, str, str]  # row in the source shard, key, stage, reason

READERS = 16  # commit records read at a time


@dataclass(frozen=True)
class FileRecord:
    """One file of a task."""

    path: str  # relative to the export's root
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Staged:
    """A task's files, complete and flushed, in a folder of their own."""

    attempt: str  # name of their folder in `_stage/`
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Commit:
    """The record of a finished task; `attempt` and `process` may differ between equal exports."""

    task: str
    attempt: str  # the winner's
    keys: list[str]  # of all rows, in their order
    faults: list[Fault]
    files: list[FileRecord]
    statistics: dict[str, Any]
    process: dict[str, Any]  # host, pid, seconds: for people
    # Labels and texts that the columns do not hold, by reason: see passthrough.left_out.
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    max_bad_fraction: float | None = None  # by which the task was judged; None: by former versions

    @property
    def rows(self) -> int:
        """Number of rows, failed ones included."""
        return len(self.keys)

    @classmethod
    def parse(cls, data: bytes) -> "Commit":
        """Return the record in a file's content; raise ValueError or TypeError if there is none."""
        values = json.loads(data)
        files = [FileRecord(**file) for file in values["files"]]
        return cls(**values | {"files": files, "faults": [tuple(one) for one in values["faults"]]})


def keys_digest(keys: Sequence[str]) -> str:
    """Return the hash of a shard's keys, which depends on their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def stage_rows(export: ExportDir, task: str, rows: Rows, writers: Sequence[BaseWriter]) -> Staged:
    """Write a task's rows in every format into a folder of its own."""
    attempt = f"{flat_name(task)}.{new_id()}"
    files: list[FileRecord] = []
    with export.store.new_folder(f"{STAGE}/{attempt}") as folder:
        for writer in writers:
            finals = [data_path(writer.kind, task, suffix) for suffix in writer.suffixes]
            paths = [folder / _staged_name(final) for final in finals]
            writer.write(paths[0], rows)
            for final, path in zip(finals, paths, strict=True):
                files.append(FileRecord(final, path.stat().st_size, sha256_file(path)))
    return Staged(attempt, tuple(files))


def _staged_name(final: str) -> str:
    """Return the name in the stage of the file data/<kind>/...<suffix>."""
    path = PurePosixPath(final)
    return f"{path.parts[1]}{path.suffix}"


def drop(export: ExportDir, staged: Staged) -> None:
    """Remove a stage."""
    export.store.delete_folder(f"{STAGE}/{staged.attempt}")


def commit(export: ExportDir, record: Commit) -> bool:
    """Create the task's commit record; return False if another process has."""
    data = json.dumps(asdict(record), sort_keys=True, allow_nan=False).encode()
    return export.store.create(commit_path(record.task), data)


def read_commits(export: ExportDir, tasks: Sequence[str]) -> list[Commit]:
    """Return the commit records of tasks, all of which are committed.

    Raises UserError for one that is damaged.
    """

    def read(task: str) -> Commit:
        name = commit_path(task)
        data = export.store.read(name)
        assert data is not None, f"{task} is not committed"
        try:
            return Commit.parse(data)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{export.store.where(name)} is damaged ({error!r}): remove it to have the task "
                "done again."
            ) from error

    return map_in_threads(read, tasks, READERS)


def publish_commit(
    export: ExportDir, record: Commit, published: Mapping[str, int] | None = None
) -> None:
    """Move the committed files to their final names, unless another process has.

    published: name -> bytes of the existing final files; None = not known. Raises UserError if a
    committed file is neither staged nor published: it was deleted.
    """
    store, stage = export.store, f"{STAGE}/{record.attempt}"
    for file in record.files:
        if published is not None and published.get(file.path) == file.bytes:
            continue
        try:
            store.move(f"{stage}/{_staged_name(file.path)}", file.path)
        except FileNotFoundError:
            if not store.exists(file.path):  # otherwise another process has moved it
                raise UserError(
                    f"{store.where(file.path)} was committed but is gone: remove "
                    f"{store.where(commit_path(record.task))} to have the task done again."
                ) from None
    if published is None:
        store.delete_folder(stage)  # empty, unless two processes publish at once


def publish_all(export: ExportDir, records: Sequence[Commit], published: Mapping[str, int]) -> None:
    """Publish the files of all records; `published`: see `publish_commit`."""

    def publish(record: Commit) -> None:
        publish_commit(export, record, published)

    map_in_threads(publish, records, READERS)


def remove_unused_stages(export: ExportDir, done: Collection[str]) -> tuple[int, int]:
    """Remove the stages of tasks that are committed and published; return files and bytes.

    The stages of other tasks may be in progress.
    """
    names = {flat_name(task) for task in done}
    unused = {
        name: size
        for name, size in export.store.sizes(STAGE).items()
        if PurePosixPath(name).parts[1].rpartition(".")[0] in names
    }
    for attempt in {PurePosixPath(name).parts[1] for name in unused}:
        export.store.delete_folder(f"{STAGE}/{attempt}")
    return len(unused), sum(unused.values())
