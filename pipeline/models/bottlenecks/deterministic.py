"""A point as the posterior: plain and denoising autoencoders."""

from typing import Literal

from torch import Tensor, nn

from pipeline.common.precision import widen
from pipeline.models.bottlenecks.base import BottleneckBase, Code, Posterior


class Deterministic(BottleneckBase):
    """z is the encoder's output: autoencoders without a rate."""

    kind: Literal["deterministic"] = "deterministic"

    def build(self) -> nn.Module:
        return PointCode()


class PointCode(nn.Module):
    """The encoder's output is the code."""

    def forward(self, statistics: Tensor, keys: Tensor | None = None) -> Code:
        """Return the point posterior at `statistics` [B, Z, ...]; `keys` make no difference."""
        del keys
        z = widen(statistics)
        return Code(z, Posterior(mu=z, logvar=None))
