"""Settings that change during a run, as pure functions of the number of samples seen.

Counting in samples keeps a schedule the same when the batch size changes, and a pure function has
no state to save. Add a schedule: one class with a `kind` and `at(samples)`, and its name in
`Schedule`.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.component import Component


class LinearSchedule(Component):
    """From `start` to `end` in a straight line over the first `over_samples`, constant after."""

    kind: Literal["linear"] = "linear"
    start: float = Field(default=0.0, ge=0)  # value at sample 0
    end: float = Field(default=1.0, ge=0)  # value from `over_samples` on
    over_samples: int = Field(gt=0)  # training samples, counted over all processes

    def at(self, samples: int) -> float:
        """Value when `samples` samples have been seen."""
        fraction = min(samples / self.over_samples, 1.0)
        return self.start + (self.end - self.start) * fraction


# A plain number is a constant schedule.
Schedule = Annotated[float, Field(ge=0)] | LinearSchedule


def value_at(schedule: Schedule, samples: int) -> float:
    """Value of a schedule when `samples` samples have been seen."""
    return schedule if isinstance(schedule, int | float) else schedule.at(samples)


class WarmupCosine(Component):
    """Linear warm-up from 0 to `peak`, then half a cosine down to `final` at the end of the run.

    Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts.
    """

    peak: float = Field(default=1e-3, gt=0)  # the highest learning rate
    final: float = Field(default=0.0, ge=0)  # the learning rate at the end of the run
    warmup_samples: int = Field(default=0, ge=0)  # training samples until `peak` is reached

    def at(self, samples: int, *, total_samples: int) -> float:
        """Learning rate for the update that follows `samples` of `total_samples` seen samples."""
        if samples < self.warmup_samples:
            return self.peak * samples / self.warmup_samples
        span = max(total_samples - self.warmup_samples, 1)
        progress = min((samples - self.warmup_samples) / span, 1.0)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
