"""Where everything lies in an export.

    data/<kind>/<shard>.<ext>   the latents, one file per source shard and format
    keys.parquet                which row holds which key
    latent_stats.json           statistics over the whole set
    manifest.json               every file with its hash, every failed row
    _SUCCESS                    hash of the manifest; written last
    _run/plan.json              the plan, created once
    _run/commits/<shard>.json   one record per finished task
    _stage/                     work in progress, gone in the end

All but `_run/` and `_stage/` is the same, byte for byte, however the work was divided.
"""

import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pipeline.files import sync_directory, write_atomic


@dataclass(frozen=True)
class ExportDir:
    """The paths of one export."""

    root: Path

    @property
    def plan(self) -> Path:
        """The plan."""
        return self.root / "_run" / "plan.json"

    @property
    def commits(self) -> Path:
        """The directory of the commit records."""
        return self.root / "_run" / "commits"

    @property
    def stage(self) -> Path:
        """The directory of unfinished work."""
        return self.root / "_stage"

    @property
    def manifest(self) -> Path:
        """The list of all files."""
        return self.root / "manifest.json"

    @property
    def statistics(self) -> Path:
        """The statistics of all latents."""
        return self.root / "latent_stats.json"

    @property
    def keys(self) -> Path:
        """The key index."""
        return self.root / "keys.parquet"

    @property
    def success(self) -> Path:
        """The mark of a finished export."""
        return self.root / "_SUCCESS"

    def commit(self, task: str) -> Path:
        """Return the commit record of a task."""
        return self.commits / f"{flat_name(task)}.json"

    def is_committed(self, task: str) -> bool:
        """Tell whether a task has its commit record."""
        return self.commit(task).exists()

    def committed(self, tasks: Iterable[str]) -> set[str]:
        """Return those of the tasks that have their commit record, from one listing."""
        names = {path.name for path in self.commits.iterdir()}
        return {task for task in tasks if self.commit(task).name in names}

    def place(self, final: Path, data: bytes) -> None:
        """Put a whole file into the root; what a crash leaves behind lies in `_run/`."""
        temporary = self.root / "_run" / f"{final.name}.{uuid.uuid4().hex[:12]}"
        write_atomic(temporary, data)
        os.replace(temporary, final)
        sync_directory(self.root)


def flat_name(task: str) -> str:
    """Return a file name for a task, whose shard may lie in a sub-folder."""
    return quote(task, safe=" ")


def data_path(kind: str, task: str, suffix: str) -> str:
    """Return where a task's file of one format lies, relative to the root."""
    return f"data/{kind}/{task}{suffix}"
