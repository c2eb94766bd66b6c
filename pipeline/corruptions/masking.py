"""Masking noise: elements forced to zero."""

from typing import Literal

from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions.base import Corrupted, CorruptionBase, Fraction, draw_severity


class Masking(CorruptionBase):
    """Each element is set to 0 with probability `fraction` (Vincent et al. 2010, section 3.3)."""

    kind: Literal["masking"] = "masking"
    fraction: Fraction = 0.25  # probability, or [low, high] to draw it per sample

    def __call__(self, x: Tensor, keys: Tensor) -> Corrupted:
        """Corrupt x [B, *event] by choices drawn from keys [B]."""
        choice = rng.uniform(rng.substream(keys, "choice"), x.shape[1:])
        mask = choice < draw_severity(self.fraction, keys, like=x)
        return Corrupted(x.masked_fill(mask, 0.0), mask)
