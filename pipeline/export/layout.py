"""The files of an export, in a directory or at an s3:// URL.

    data/<kind>/<shard>.<ext>       the latents, one file per source shard and format
    keys.parquet                    which row holds which key
    latent_stats.json               statistics over the whole set
    manifest.json                   every file with its hash, every failed row
    _SUCCESS                        hash of the manifest; written last
    _run/plan.json                  the plan, created once
    _run/commits/<shard>.json       one record per finished task
    _run/failures/<shard>.<id>.json one per attempt that failed because of the task
    _stage/<shard>.<id>/            work in progress, removed in the end

All files outside `_run/` and `_stage/` have the same bytes, however the work was divided.
"""

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from pipeline.data.storage.writable import WritableStore
from pipeline.latents.manifest import MANIFEST, PLAN, SUCCESS

__all__ = ["MANIFEST", "PLAN", "SUCCESS"]

RUN, STAGE, DATA = "_run", "_stage", "data"
COMMITS, FAILURES = f"{RUN}/commits", f"{RUN}/failures"
MAX_NAME = 190  # bytes of a task's part of a file name, which has 255 at most
STATISTICS, KEYS = "latent_stats.json", "keys.parquet"


@dataclass(frozen=True)
class ExportDir:
    """One export in its store."""

    store: WritableStore

    @property
    def root(self) -> str:
        """The directory or URL."""
        return self.store.root

    def is_finished(self) -> bool:
        """Return whether the export is finished: it has `_SUCCESS`."""
        return self.store.exists(SUCCESS)

    def is_committed(self, task: str) -> bool:
        """Return whether a task has its commit record."""
        return self.store.exists(commit_path(task))

    def committed(self, tasks: Iterable[str]) -> set[str]:
        """Return the committed ones of the tasks, by one listing."""
        names = self.store.sizes(COMMITS)
        return {task for task in tasks if commit_path(task) in names}

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file of the root atomically; a crash leaves a temporary file in `_run/`."""
        temporary = f"{RUN}/{name}.{new_id()}"
        self.store.put(temporary, data)
        self.store.move(temporary, name)


def new_id() -> str:
    """Return a unique name."""
    return uuid.uuid4().hex[:12]


def flat_name(task: str) -> str:
    """Return a file name for a task, whose shard may be in a sub-folder.

    A name that is too long (an id and suffixes follow it) is cut, and ends with a hash.
    """
    name = quote(task, safe=" ")
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(task.encode()).hexdigest()[:16]
    return f"{name[: MAX_NAME - 17]}-{digest}"


def commit_path(task: str) -> str:
    """Return the name of a task's commit record."""
    return f"{COMMITS}/{flat_name(task)}.json"


def data_path(kind: str, task: str, suffix: str) -> str:
    """Return the name of a task's file of one format."""
    return f"{DATA}/{kind}/{task}{suffix}"
