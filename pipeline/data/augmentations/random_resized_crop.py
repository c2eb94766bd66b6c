"""A random part of the image, of random area and aspect ratio (Szegedy et al. 2014, section 6).

The distribution is the one that torchvision's RandomResizedCrop uses: area uniform,
logarithm of the aspect ratio uniform, up to ten attempts, then the largest central part whose
ratio is allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.data.augmentations.base import AugmentationBase, Size, View

NUM_ATTEMPTS = 10
Fraction = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


class RandomResizedCrop(AugmentationBase):
    """Crop a random part of the image; the decoder stretches it to the model's size."""

    kind: Literal["random_resized_crop"] = "random_resized_crop"
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)  # of the area
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)  # width to height, over that of the model's size

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} must be [lowest, highest], but is [{low}, {high}]")
        return self

    @property
    def num_draws(self) -> int:
        """Area and ratio of each attempt, row and column."""
        return 2 * NUM_ATTEMPTS + 2

    def apply(self, view: View, draws: Sequence[float], size: Size) -> View:
        height, width = self._part(view, draws[:-2], size[1] / size[0])
        top = int(draws[-2] * (round(view.height) - height + 1))
        left = int(draws[-1] * (round(view.width) - width + 1))
        return replace(view, top=view.top + top, left=view.left + left, height=height, width=width)

    def _part(self, view: View, draws: Sequence[float], model_ratio: float) -> tuple[int, int]:
        """(height, width) of the part, whole pixels. model_ratio: width to height."""
        whole_height, whole_width = round(view.height), round(view.width)
        low, high = (math.log(ratio) for ratio in self.ratio)
        for area_draw, ratio_draw in zip(draws[::2], draws[1::2], strict=True):
            smallest, largest = self.scale
            area = (smallest + area_draw * (largest - smallest)) * view.height * view.width
            ratio = math.exp(low + ratio_draw * (high - low)) * model_ratio
            height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < height <= whole_height and 0 < width <= whole_width:
                return height, width
        narrowest, widest = (ratio * model_ratio for ratio in self.ratio)
        ratio = min(max(view.width / view.height, narrowest), widest)
        height = min(whole_height, round(whole_width / ratio))
        return max(height, 1), max(min(whole_width, round(height * ratio)), 1)
