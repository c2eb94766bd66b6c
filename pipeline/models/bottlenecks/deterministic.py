"""A point as the posterior: plain and denoising autoencoders."""

from typing import Literal

from torch import Tensor

from pipeline.common.precision import widen
from pipeline.models.bottlenecks.base import BottleneckBase, Posterior


class Deterministic(BottleneckBase):
    """z is the encoder's output: autoencoders without a rate."""

    kind: Literal["deterministic"] = "deterministic"

    def posterior(self, statistics: Tensor) -> Posterior:
        """Return the point posterior at `statistics` [B, Z, ...]."""
        return Posterior(mu=widen(statistics), logvar=None)
