"""A transform of latents and targets: in half of the steps both are mirrored."""

from typing import Literal

from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions.latents import LatentTransformBase


class Mirror(LatentTransformBase):
    """The order of a vector latent's channels, and the picture's columns."""

    kind: Literal["mirror"] = "mirror"

    def apply(self, z: Tensor, target: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if rng.uniform(key).item() < 0.5:
            return z, target
        return z.flip(1), target.flip(-1)
