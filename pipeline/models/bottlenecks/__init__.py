"""Bottlenecks: the encoder's output -> the posterior q(z | x) -> a latent z.

Add a kind: one file with a `BottleneckBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.models.bottlenecks.base import BottleneckBase, Posterior
from pipeline.models.bottlenecks.deterministic import Deterministic
from pipeline.models.bottlenecks.gaussian import LOGVAR_BOUND, Gaussian

Bottleneck = Annotated[Deterministic | Gaussian, Field(discriminator="kind")]

__all__ = [
    "LOGVAR_BOUND",
    "Bottleneck",
    "BottleneckBase",
    "Deterministic",
    "Gaussian",
    "Posterior",
]
