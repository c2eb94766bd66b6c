"""A square window at a random position, at a fixed scale."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from pipeline.data.augmentations.base import AugmentationBase, View


class RandomCrop(AugmentationBase):
    """Resize the shorter side to `shorter_side` pixels, then crop the model's square.

    Corners lie on whole pixels of the resized image, each equally likely.
    """

    kind: Literal["random_crop"] = "random_crop"
    shorter_side: Annotated[int, Field(ge=1, le=16384)]  # at least the decoder's size

    @property
    def num_draws(self) -> int:
        """Two draws: row and column."""
        return 2

    def apply(self, view: View, draws: Sequence[float], size: int) -> View:
        scale = min(view.height, view.width) / self.shorter_side  # source pixels per pixel
        top, left = (
            int(draw * (max(round(side / scale) - size, 0) + 1)) * scale
            for draw, side in zip(draws, (view.height, view.width), strict=True)
        )
        side = size * scale
        return replace(view, top=view.top + top, left=view.left + left, height=side, width=side)
