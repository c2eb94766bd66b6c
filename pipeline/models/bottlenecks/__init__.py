"""Bottlenecks: the encoder's output -> a `Code`: posterior q(z | x), latent z, ids of entries.

Add a kind: one file with a `BottleneckBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.models.bottlenecks.base import BottleneckBase, Code, Posterior
from pipeline.models.bottlenecks.deterministic import Deterministic
from pipeline.models.bottlenecks.gaussian import LOGVAR_BOUND, Gaussian

Bottleneck = Annotated[Deterministic | Gaussian, Field(discriminator="kind")]

__all__ = [
    "LOGVAR_BOUND",
    "Bottleneck",
    "BottleneckBase",
    "Code",
    "Deterministic",
    "Gaussian",
    "Posterior",
]
