"""The plan of an export, stored by whoever is first and compared by all others."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.common import strict
from pipeline.common.errors import StoreError, UserError
from pipeline.common.files import canonical_json
from pipeline.export.layout import COMMITS, DATA, PLAN, RUN, ExportDir
from pipeline.export.plan import Plan, find_plan, read_plan
from pipeline.models.autoencoder import ModelConfig


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
    stored = read_plan(export)
    compare_plans(export, stored, plan)
    return stored, guarantee


def compare_plans(export: ExportDir, stored_plan: Plan, plan: Plan) -> None:
    """Raise UserError if the stored plan is another, with what differs."""
    # By way of JSON, as stored: tuples are lists there.
    asked = json.loads(canonical_json(plan.to_json()))
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
