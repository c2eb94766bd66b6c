"""The commit protocol: safe against SIGKILL at every instruction, with any number of processes.

1. stage    all files of a task under a unique name in `_stage/`, flushed to the disk and hashed
2. commit   create `_run/commits/<task>.json`, which fails if it exists: the one atomic instant. Of
            any number of processes with the same task one wins, the others drop their stage
3. publish  move the winner's files to their final names; whoever finds a commit whose files are
            not there finishes the move

Killed before 2: litter in `_stage/`, the task is done again. Killed between 2 and 3 or during 3:
the next process publishes. There are no locks to go stale and no claims to time out.
"""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.export.layout import ExportDir, data_path, flat_name
from pipeline.files import create_exclusive, sha256_file, sync_directory
from pipeline.writers import BaseWriter, Rows


@dataclass(frozen=True)
class FileRecord:
    """One file of a task."""

    path: str  # relative to the export's root
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Staged:
    """A task's files, complete and flushed, under a name that nobody else uses."""

    directory: Path
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Commit:
    """The record of a finished task. `attempt` and `process` may differ between equal exports."""

    task: str
    attempt: str  # name of the winner's directory in `_stage/`
    rows: int
    keys_sha256: str
    faults: list[list[Any]]  # [row in the source shard, key, stage, reason]
    files: list[FileRecord]
    statistics: dict[str, Any]
    process: dict[str, Any]  # host, pid, seconds: for people

    @classmethod
    def read(cls, path: Path) -> "Commit":
        """Return the record in a file."""
        values = json.loads(path.read_bytes())
        return cls(**values | {"files": [FileRecord(**file) for file in values["files"]]})


def stage_rows(export: ExportDir, task: str, rows: Rows, writers: Sequence[BaseWriter]) -> Staged:
    """Write a task's rows in every format into a directory of its own."""
    directory = export.stage / f"{flat_name(task)}.{uuid.uuid4().hex[:12]}"
    directory.mkdir(parents=True)
    files: list[FileRecord] = []
    for writer in writers:
        finals = [data_path(writer.kind, task, suffix) for suffix in writer.suffixes]
        paths = [directory / _staged_name(final) for final in finals]
        writer.write(paths[0], rows)
        for final, path in zip(finals, paths, strict=True):
            files.append(FileRecord(final, path.stat().st_size, sha256_file(path)))
    sync_directory(directory)
    sync_directory(export.stage)
    return Staged(directory, tuple(files))


def _staged_name(final: str) -> str:
    """Return the name in the stage of a file that will lie at data/<kind>/...<suffix>."""
    path = PurePosixPath(final)
    return f"{path.parts[1]}{path.suffix}"


def drop(staged: Staged) -> None:
    """Remove a stage that is not needed (any more)."""
    shutil.rmtree(staged.directory, ignore_errors=True)  # finalize may be removing it, too


def commit(export: ExportDir, record: Commit) -> bool:
    """Create the task's commit record; tell whether this call did it."""
    data = json.dumps(asdict(record), sort_keys=True, allow_nan=False).encode()
    return create_exclusive(export.commit(record.task), data)


def publish_commit(export: ExportDir, record: Commit) -> None:
    """Move the committed files to their final names, as far as nobody has done so.

    Raises RuntimeError when a committed file is neither staged nor published: somebody deleted it.
    """
    stage = export.stage / record.attempt
    for file in record.files:
        final = export.root / file.path
        if final.exists():
            continue
        staged = stage / _staged_name(file.path)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(staged, final)
        except FileNotFoundError:
            if not final.exists():  # else another process was faster
                raise RuntimeError(
                    f"{final} was committed but is gone: remove {export.commit(record.task)} to "
                    "have the task done again."
                ) from None
        sync_directory(final.parent)
    if stage.exists():
        shutil.rmtree(stage, ignore_errors=True)  # empty, unless two processes publish at once
