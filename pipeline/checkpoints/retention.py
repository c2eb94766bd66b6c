"""Which checkpoints are kept: the newest ones, one per `every_samples`, and the best.

The best one is found by the evaluations in `metrics.jsonl`: step -> value of the chosen metric.
"""

import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.checkpoints.folder import list_checkpoints, read_state
from pipeline.common.component import Component
from pipeline.common.errors import UserError
from pipeline.common.files import temporary_name
from pipeline.monitoring.monitor import is_evaluation


class BestMetric(Component):
    """What makes one checkpoint better than another: a metric of the held-out evaluation."""

    metric: str = "eval/loss"  # as metrics.jsonl names it
    mode: Literal["min", "max"] = "min"  # whether lower or higher values are better

    def values(self, records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
        """Return the metric's values by step, in the order of `records` of metrics.jsonl.

        Without step 0, whose weights are not saved. Raises UserError if an evaluation lacks the
        metric.
        """
        evaluations = [record for record in records if is_evaluation(record)]
        for record in evaluations:
            if self.metric not in record:
                known = sorted(name for name in record if name.startswith("eval"))
                raise UserError(
                    f"checkpoint.keep.best.metric = {self.metric!r} is no metric of this run's "
                    f"evaluation; there are {', '.join(known)}."
                )
        return {record["step"]: record[self.metric] for record in evaluations if record["step"]}

    def best(self, values: Mapping[int, float]) -> int | None:
        """Return the step of the best finite value, the first if several are equal."""
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        choose = min if self.mode == "min" else max
        return choose(finite, key=lambda step: finite[step]) if finite else None


class Keep(Component):
    """Which checkpoints are kept; the others are removed after each save."""

    latest: int = Field(default=2, ge=2)  # two, in case the newest is damaged
    # Keep the first checkpoint of each interval of this many samples for good; null: none.
    every_samples: int | None = Field(default=None, gt=0)
    # Keep the best by evaluation; it is saved as soon as it is found. null: do not.
    best: BestMetric | None = None

    def at_most(self, total_samples: int) -> int:
        """Return how many checkpoints a run of `total_samples` may keep."""
        for_good = total_samples // self.every_samples if self.every_samples else 0
        return self.latest + for_good + (self.best is not None)


class CheckpointConfig(Component):
    """When to save, and what to keep."""

    every_steps: int = Field(default=1000, gt=0)  # save after every so many steps, and at the end
    keep: Keep = Keep()


def best_checkpoint(
    checkpoints: Collection[Path], by: BestMetric, values: Mapping[int, float]
) -> Path | None:
    """Return the best of the given checkpoints; None if none was evaluated."""
    by_step = {int(path.name.removeprefix("step-")): path for path in checkpoints}
    best = by.best({step: value for step, value in values.items() if step in by_step})
    return None if best is None else by_step[best]


def retain(directory: Path, keep: Keep, values: Mapping[int, float]) -> None:
    """Remove the checkpoints that `keep` does not name; each is renamed first, which is atomic.

    values: of the metric of `keep.best`, by step.
    """
    checkpoints = list_checkpoints(directory)
    kept = set(checkpoints[: keep.latest])
    if keep.best is not None and (best := best_checkpoint(checkpoints, keep.best, values)):
        kept.add(best)
    if keep.every_samples is not None:
        # The list ends with the oldest: of each interval the oldest checkpoint remains in the dict.
        intervals = {_position(path) // keep.every_samples: path for path in checkpoints}
        kept |= {path for number, path in intervals.items() if number > 0}
    for path in checkpoints:
        if path not in kept:
            removed = temporary_name(path)
            path.rename(removed)
            shutil.rmtree(removed)


def _position(path: Path) -> int:
    """Return the samples seen; 0 for a damaged checkpoint, which is not kept for good."""
    try:
        return read_state(path).position
    except (OSError, ValueError, TypeError):
        return 0
