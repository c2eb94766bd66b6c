"""Additive white noise."""

from typing import Literal

from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions.base import Corrupted, CorruptionBase, Scale, draw_severity


class GaussianNoise(CorruptionBase):
    """x + sigma * noise, not clipped (Vincent et al. 2010, section 3.3)."""

    kind: Literal["gaussian_noise"] = "gaussian_noise"
    sigma: Scale = 0.1  # standard deviation, in units of the [0, 1] range

    @property
    def has_mask(self) -> bool:
        """No mask: noise is added to all elements."""
        return False

    def __call__(self, x: Tensor, keys: Tensor) -> Corrupted:
        """Add noise, drawn from keys [B], to x [B, *event]."""
        noise = rng.normal(rng.substream(keys, "noise"), x.shape[1:])
        sigma = draw_severity(self.sigma, keys, like=x)
        return Corrupted(x + (sigma * noise).to(x.dtype), mask=None)
