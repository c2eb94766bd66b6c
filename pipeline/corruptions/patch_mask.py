"""Whole patches of an image forced to one value."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions.base import Corrupted, CorruptionBase, Fraction, draw_severity


class PatchMask(CorruptionBase):
    """Exactly round(fraction * patches) of a sample's square patches, at random, become `fill`.

    The mask of He et al. 2022 ("Masked autoencoders are scalable vision learners", section 3), on
    pixels: all channels of a patch together.
    """

    kind: Literal["patch_mask"] = "patch_mask"
    patch_size: int = Field(default=8, gt=0)  # pixels; divides height and width
    fraction: Fraction = 0.5  # of the patches, or [low, high] to draw it per sample
    fill: float = Field(default=0.0, ge=0, le=1)  # value of a masked element

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the event is an image that the patches tile."""
        if len(event_shape) != 3:
            raise ValueError(
                f"patch_mask needs images [C, H, W], but an event is {list(event_shape)}"
            )
        if event_shape[1] % self.patch_size or event_shape[2] % self.patch_size:
            size = f"{event_shape[1]} x {event_shape[2]}"
            raise ValueError(
                f"patch_mask: patch_size {self.patch_size} does not divide {size} pixels"
            )

    def __call__(self, x: Tensor, keys: Tensor) -> Corrupted:
        """Corrupt x [B, C, H, W] by a ranking of patches drawn from keys [B]."""
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        score = rng.uniform(rng.substream(keys, "ranking"), (rows * columns,))
        rank = score.argsort(dim=1, stable=True).argsort(dim=1)
        fraction = draw_severity(self.fraction, keys, like=rank)
        chosen = (rank < (fraction * (rows * columns)).round()).view(-1, 1, rows, columns)
        pixels = chosen.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        mask = pixels.expand_as(x)
        return Corrupted(x.masked_fill(mask, self.fill), mask)
