"""The plan: which tasks there are, and the fingerprint of everything that decides a byte.

config, run, index -> Plan -> `_run/plan.json`, created once. A later start, with any number of
processes, must come to the same plan, or it is refused with the differences.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from pydantic import ValidationError

from pipeline.common import strict
from pipeline.common.errors import StoreError, UserError
from pipeline.common.files import canonical_json
from pipeline.export.layout import COMMITS, DATA, PLAN, RUN, ExportDir
from pipeline.latents.manifest import FORMAT
from pipeline.models.autoencoder import ModelConfig


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


def find_plan(export: ExportDir) -> Plan | None:
    """Return the stored plan, if there is one.

    Raises UserError when it is of another format, or damaged.
    """
    data, where = export.store.read(PLAN), export.store.where(PLAN)
    if data is None:
        return None
    try:
        stored = json.loads(data)
        if stored["format"] == FORMAT:
            return Plan(stored["fingerprint"], tuple(Task(**task) for task in stored["tasks"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged ({error!r}).") from error
    raise UserError(f"{where} has the format {stored['format']!r}; this code reads {FORMAT!r}.")


def read_plan(export: ExportDir) -> Plan:
    """Return the stored plan; raises UserError when there is none."""
    plan = find_plan(export)
    if plan is None:
        raise UserError(
            f"{export.root} holds no export: {PLAN} is not there. Name the directory or URL that "
            "an export filled (its setting `out`); `latentmill export plan CONFIG` begins one."
        )
    return plan


def with_defaults(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored fingerprint with the settings of the model that came later, as they were."""
    model = fingerprint["model"]
    try:
        settings = ModelConfig.model_validate_json(json.dumps(model["architecture"]))
    except (ValidationError, KeyError):  # of another version: compared as it is
        return dict(fingerprint)
    architecture = settings.model_dump(mode="json", exclude={"gradient_checkpointing"})
    return {**fingerprint, "model": {**model, "architecture": architecture}}


def adopt_plan(export: ExportDir, plan: Plan) -> tuple[Plan, str]:
    """Store the plan, or check that the stored one is the same, and return it.

    Returns also what the place guarantees, in words. Raises UserError if it guarantees nothing or
    cannot be written, or if the stored plan is another.
    """
    text = canonical_json(plan.to_json())
    left_over = next(iter(export.store.sizes(DATA)), None)  # before the plan, which comes first
    try:
        guarantee = export.store.check_exclusive(RUN)
        if left_over is not None and find_plan(export) is None:
            raise UserError(
                f"{export.root} holds {left_over}, but no {PLAN} that says what it is of: remove "
                "it all, or set another out."
            )
        if export.store.create(PLAN, text):
            return plan, guarantee
    except StoreError:
        raise
    except OSError as error:
        raise UserError(f"{export.root} cannot be written: {error.strerror}. Set out.") from error
    # By way of JSON, as stored: tuples are lists there.
    asked = json.loads(text)
    stored_plan = read_plan(export)
    stored = stored_plan.to_json()
    if "encoder_sha256" not in stored["fingerprint"]["model"]:  # by 93dd2d6, which did not say it
        asked["fingerprint"]["model"].pop("encoder_sha256", None)
    # Other tasks follow from another data set, which is said by one line instead of one per shard.
    fingerprints = (with_defaults(stored["fingerprint"]), asked["fingerprint"])
    differences = strict.difference(*fingerprints) or strict.difference(
        {"tasks": stored["tasks"]}, {"tasks": asked["tasks"]}
    )
    if differences:
        lines = [f"  {path}: there {left!r}, now {right!r}" for path, left, right in differences]
        shown = lines[:20] + ([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])
        begun = export.store.sizes(COMMITS)
        hint = "" if begun else " Nothing is done there yet: remove it to begin anew."
        raise UserError(
            f"{export.root} holds an export of something else:\n"
            + "\n".join(shown)
            + f"\nSet another out, or give the former settings.{hint}"
        )
    return stored_plan, guarantee
