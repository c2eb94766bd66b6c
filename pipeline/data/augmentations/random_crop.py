"""A window of the model's size at a random position, at a fixed scale."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from pipeline.data.augmentations.base import AugmentationBase, Size, View


class RandomCrop(AugmentationBase):
    """Resize the shorter side to `shorter_side` pixels, then crop the model's size.

    If the model's size is no square, the image is resized until it covers a rectangle of its
    proportions with this shorter side: of a portrait the crop may be landscape. Corners lie on
    whole pixels of the resized image, each equally likely.
    """

    kind: Literal["random_crop"] = "random_crop"
    shorter_side: Annotated[int, Field(ge=1, le=16384)]  # at least the decoder's

    @property
    def num_draws(self) -> int:
        """Two draws: row and column."""
        return 2

    def apply(self, view: View, draws: Sequence[float], size: Size) -> View:
        sides = (view.height, view.width)
        # Source pixels per pixel.
        scale = min(s * (min(size) / n) for s, n in zip(sides, size, strict=True))
        scale /= self.shorter_side
        top, left = (
            # A side rounded up leads out by half a pixel at most: the decoder cuts that off.
            int(draw * (max(round(side / scale) - wanted, 0) + 1)) * scale
            for draw, side, wanted in zip(draws, sides, size, strict=True)
        )
        height, width = (wanted * scale for wanted in size)
        return replace(view, top=view.top + top, left=view.left + left, height=height, width=width)
