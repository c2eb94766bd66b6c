"""Mirror left and right."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from pipeline.data.augmentations.base import AugmentationBase, Size, View


class HorizontalFlip(AugmentationBase):
    """Mirror a fraction of the samples."""

    kind: Literal["horizontal_flip"] = "horizontal_flip"
    probability: Annotated[float, Field(gt=0, le=1)] = 0.5  # of a sample to be mirrored

    @property
    def num_draws(self) -> int:
        """One draw: flip or not."""
        return 1

    def apply(self, view: View, draws: Sequence[float], size: Size) -> View:  # noqa: ARG002
        return replace(view, is_mirrored=view.is_mirrored ^ (draws[0] < self.probability))
