"""Salt-and-pepper noise: elements forced to an end of the range."""

from typing import Literal

from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions.base import Corrupted, CorruptionBase, Fraction, draw_severity


class SaltAndPepper(CorruptionBase):
    """Each element becomes 0 or 1, by a fair coin, with probability `fraction`.

    Vincent et al. 2010, section 3.3.
    """

    kind: Literal["salt_and_pepper"] = "salt_and_pepper"
    fraction: Fraction = 0.1  # probability, or [low, high] to draw it per sample

    def __call__(self, x: Tensor, keys: Tensor) -> Corrupted:
        """Corrupt x [B, *event] by choices and coins drawn from keys [B]."""
        choice = rng.uniform(rng.substream(keys, "choice"), x.shape[1:])
        coin = rng.uniform(rng.substream(keys, "coin"), x.shape[1:]) < 0.5
        mask = choice < draw_severity(self.fraction, keys, like=x)
        return Corrupted(x.where(~mask, coin.to(x.dtype)), mask)
