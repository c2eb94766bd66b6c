"""Stores the plan of an export: the first process writes it, all others compare theirs with it."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.common import strict
from pipeline.common.errors import StoreError, UserError
from pipeline.common.files import canonical_json
from pipeline.export.layout import COMMITS, DATA, PLAN, RUN, ExportDir
from pipeline.export.plan import ExportPlan, find_plan, read_plan
from pipeline.models.autoencoder import ModelConfig


def with_defaults(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored fingerprint with the defaults of model settings that were added later."""
    model = fingerprint["model"]
    try:
        settings = ModelConfig.model_validate_json(json.dumps(model["architecture"]))
    except (ValidationError, KeyError):  # of another version: compared unchanged
        return dict(fingerprint)
    architecture = settings.model_dump(mode="json", exclude={"gradient_checkpointing"})
    return {**fingerprint, "model": {**model, "architecture": architecture}}


def store_plan(export: ExportDir, plan: ExportPlan) -> tuple[ExportPlan, str]:
    """Store the plan, or check that the stored one is the same, and return it.

    Returns also how the store creates a file only once, in words. Raises UserError if it cannot,
    if it cannot be written, or if the stored plan differs.
    """
    text = canonical_json(plan.to_json())
    left_over = next(iter(export.store.sizes(DATA)), None)  # data files without a plan
    try:
        guarantee = export.store.check_exclusive(RUN)
        if left_over is not None and find_plan(export) is None:
            raise UserError(
                f"{export.root} holds {left_over}, but no {PLAN} that describes it: remove "
                "everything in it, or set another out."
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


def compare_plans(export: ExportDir, stored_plan: ExportPlan, plan: ExportPlan) -> None:
    """Raise UserError if the stored plan is another, with what differs."""
    # By way of JSON, as stored: tuples are lists there.
    asked = json.loads(canonical_json(plan.to_json()))
    stored = stored_plan.to_json()
    there, here = with_defaults(stored["fingerprint"]), asked["fingerprint"]
    if "encoder_sha256" not in there["model"]:  # written by 93dd2d6, without it
        here["model"].pop("encoder_sha256", None)
    elif there["model"]["encoder_sha256"] == here["model"]["encoder_sha256"]:
        here["model"] = there["model"]  # the same latents, even if the decoder differs
    # Another data set has other tasks: report the data set only, not every shard.
    differences = strict.difference(there, here) or strict.difference(
        {"tasks": stored["tasks"]}, {"tasks": asked["tasks"]}
    )
    if differences:
        lines = [f"  {path}: there {left!r}, now {right!r}" for path, left, right in differences]
        shown = lines[:20] + ([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])
        begun = export.store.sizes(COMMITS)
        hint = "" if begun else " Nothing is done there yet: remove it to start again."
        raise UserError(
            f"{export.root} holds an export of something else:\n"
            + "\n".join(shown)
            + f"\nSet another out, or give the former settings.{hint}"
        )
