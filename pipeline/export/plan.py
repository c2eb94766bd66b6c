"""The plan: which tasks there are, and the fingerprint of everything that decides a byte.

config, run, index -> Plan -> `_run/plan.json`, created once. A later start, with any number of
processes, must come to the same plan, or it is refused with the differences.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline import strict
from pipeline.errors import UserError
from pipeline.export.layout import ExportDir
from pipeline.files import canonical_json, create_exclusive

FORMAT = "latentmill-export-v1"


@dataclass(frozen=True)
class Task:
    """One source shard."""

    name: str  # stem of the shard and of every file made from it
    shard: int  # number of the shard in the index
    rows: int  # of the chosen split
    source: str  # file name of the shard
    source_sha256: str


@dataclass(frozen=True)
class Plan:
    """All tasks in the order of the shards, and what they are done with."""

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


def read_plan(path: Path) -> Plan:
    """Return the stored plan; raises UserError when it is of another format."""
    stored = json.loads(path.read_bytes())
    if stored.get("format") != FORMAT:
        raise UserError(
            f"{path} has the format {stored.get('format')!r}; this code reads {FORMAT!r}."
        )
    return Plan(stored["fingerprint"], tuple(Task(**task) for task in stored["tasks"]))


def adopt_plan(export: ExportDir, plan: Plan) -> None:
    """Store the plan, or check that the stored one is the same; raises UserError if it is not."""
    try:
        export.commits.mkdir(parents=True, exist_ok=True)
        if create_exclusive(export.plan, canonical_json(plan.to_json())):
            return
    except OSError as error:
        raise UserError(f"{export.root} cannot be written: {error.strerror}. Set out.") from error
    # By way of JSON, as stored: tuples are lists there.
    asked = json.loads(canonical_json(plan.to_json()))
    stored = read_plan(export.plan).to_json()
    differences = strict.difference(stored, asked)
    if differences:
        lines = [f"  {path}: there {left!r}, now {right!r}" for path, left, right in differences]
        shown = lines[:20] + ([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise UserError(
            f"{export.root} holds an export of something else:\n"
            + "\n".join(shown)
            + "\nSet another out, or give the former settings."
        )
