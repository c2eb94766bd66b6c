"""The plan: all tasks, and the fingerprint of everything that the files depend on.

config, run, index -> ExportPlan -> `_run/plan.json`, created once. A later start must come to the
same plan, with any number of processes, or it is refused and the differences are listed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json
from pipeline.export.layout import PLAN, ExportDir
from pipeline.latents.manifest import FORMAT


@dataclass(frozen=True)
class Task:
    """One source shard."""

    name: str  # stem of the shard and of every file made from it
    shard: int  # number of the shard in the index
    rows: int  # of the chosen split
    source: str  # file name of the shard
    source_sha256: str


@dataclass(frozen=True)
class ExportPlan:
    """All tasks in the order of the shards, and the fingerprint."""

    fingerprint: Mapping[str, Any]
    tasks: tuple[Task, ...]

    @property
    def rows(self) -> int:
        """Rows of all tasks."""
        return sum(task.rows for task in self.tasks)

    def digest(self) -> str:
        """Return the hex identity of fingerprint and tasks."""
        return sha256(canonical_json(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as it is stored."""
        return {
            "format": FORMAT,
            "fingerprint": dict(self.fingerprint),
            "tasks": [asdict(task) for task in self.tasks],
        }


def find_plan(export: ExportDir) -> ExportPlan | None:
    """Return the stored plan, if there is one; raises UserError if it cannot be read."""
    data, where = export.store.read(PLAN), export.store.where(PLAN)
    if data is None:
        return None
    try:
        stored = json.loads(data)
        if stored["format"] == FORMAT:
            return ExportPlan(
                stored["fingerprint"], tuple(Task(**task) for task in stored["tasks"])
            )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged ({error!r}).") from error
    raise UserError(f"{where} has the format {stored['format']!r}; this code reads {FORMAT!r}.")


def read_plan(export: ExportDir) -> ExportPlan:
    """Return the stored plan; raises UserError when there is none."""
    plan = find_plan(export)
    if plan is None:
        raise UserError(
            f"{export.root} holds no export: {PLAN} is not there. Name the directory or URL that "
            "an export filled (its setting `out`); `latentmill export plan CONFIG` begins one."
        )
    return plan
