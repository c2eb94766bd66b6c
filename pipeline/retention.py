"""Which checkpoints stay: the newest, one for good every so many samples, and the best."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.checkpoint import BestSoFar, list_checkpoints, read_state
from pipeline.component import Component
from pipeline.errors import UserError
from pipeline.files import temporary_name


class BestMetric(Component):
    """What makes one checkpoint better than another: a metric of the held-out evaluation."""

    metric: str = "eval/loss"  # as metrics.jsonl names it
    mode: Literal["min", "max"] = "min"


class Keep(Component):
    """Which checkpoints are kept; the others are removed after each save."""

    latest: int = Field(default=2, ge=2)  # two, so that a damaged one has a predecessor
    # For good: the first checkpoint in every stretch of so many samples. null: none.
    every_samples: int | None = Field(default=None, gt=0)
    # The best evaluated one, which is saved when it is found. null: none.
    best: BestMetric | None = None

    def at_most(self, total_samples: int) -> int:
        """How many checkpoints a run of so many samples may keep."""
        milestones = total_samples // self.every_samples if self.every_samples else 0
        return self.latest + milestones + (self.best is not None)


class CheckpointConfig(Component):
    """When to save, and what to keep."""

    every_steps: int = Field(default=1000, gt=0)
    keep: Keep = Keep()


def judge(
    best: BestSoFar | None, by: BestMetric, metrics: Mapping[str, float], step: int
) -> BestSoFar:
    """Return the best evaluation so far, now that the one of `step` gave `metrics`.

    A value that is not finite is never the best. Raises UserError if there is no such metric.
    """
    if by.metric not in metrics:
        raise UserError(
            f"checkpoint.keep.best.metric = {by.metric!r} is no metric of this run's evaluation; "
            f"there are {', '.join(sorted(metrics))}."
        )
    if best is None or (best.metric, best.mode) != (by.metric, by.mode):
        best = BestSoFar(by.metric, by.mode)
    value = metrics[by.metric]
    if not math.isfinite(value) or not _improves(value, best):
        return replace(best, evaluations_since=best.evaluations_since + 1)
    return replace(best, value=value, step=step, evaluations_since=0)


def _improves(value: float, best: BestSoFar) -> bool:
    if best.value is None:
        return True
    return value < best.value if best.mode == "min" else value > best.value


def retain(directory: Path, keep: Keep, *, best_step: int | None = None) -> None:
    """Remove what `keep` does not name; renamed first, so that none is ever half there."""
    checkpoints = list_checkpoints(directory)
    kept = set(checkpoints[: keep.latest]) | {directory / f"step-{best_step}"}
    if keep.every_samples is not None:
        # Oldest last, so that the first checkpoint of each stretch is the one that is left.
        stretches = {read_state(path).position // keep.every_samples: path for path in checkpoints}
        kept |= {path for number, path in stretches.items() if number > 0}
    for path in checkpoints:
        if path not in kept:
            doomed = temporary_name(path)
            path.rename(doomed)
            shutil.rmtree(doomed)
