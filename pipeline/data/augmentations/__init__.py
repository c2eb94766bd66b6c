"""Augmentations of images: the list of choices (`data.augmentations`), and how they are drawn.

    (seed, epoch, uid) -> draws [n, num_draws], when the window is read
    draws of one sample, (height, width) -> View -> ImageDecode.decode_view

An augmentation is a function of the sample and the epoch alone, like a corruption. Unlike a
corruption, it also changes the target.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from pipeline.common import rng
from pipeline.data.augmentations.base import Size, View
from pipeline.data.augmentations.horizontal_flip import HorizontalFlip
from pipeline.data.augmentations.random_crop import RandomCrop
from pipeline.data.augmentations.random_resized_crop import RandomResizedCrop

Augmentation = Annotated[
    HorizontalFlip | RandomCrop | RandomResizedCrop, Field(discriminator="kind")
]
ViewOf = Callable[[int, int], View]  # (height, width) of the upright image -> part to decode

__all__ = [
    "Augmentation",
    "Augmenter",
    "HorizontalFlip",
    "RandomCrop",
    "RandomResizedCrop",
    "View",
    "ViewOf",
]


class Augmenter:
    """The augmentations of one training stream, in their order."""

    def __init__(self, augmentations: Sequence[Augmentation], seed: int, size: Size) -> None:
        self._augmentations = augmentations
        self._seed = seed
        self._size = size
        self.num_draws = sum(augmentation.num_draws for augmentation in augmentations)

    def draw(self, epoch: NDArray[np.int64], uid: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the random numbers [n, num_draws] of samples, uniform on [0, 1)."""
        if self.num_draws == 0:
            return np.zeros((len(uid), 0), np.float32)
        keys = rng.sample_keys(
            self._seed,
            "train/augmentation",
            epoch=torch.from_numpy(epoch),
            uid=torch.from_numpy(uid),
        )
        return rng.uniform(keys, (self.num_draws,)).numpy()

    def view_of(self, draws: NDArray[Any]) -> ViewOf:
        """Return a function from the size of the sample's image to its view."""

        def view(height: int, width: int) -> View:
            found, used = View(0.0, 0.0, height, width), 0
            numbers: list[float] = draws.tolist()
            for augmentation in self._augmentations:
                mine = numbers[used : used + augmentation.num_draws]
                found = augmentation.apply(found, mine, self._size)
                used += augmentation.num_draws
            return found

        return view
