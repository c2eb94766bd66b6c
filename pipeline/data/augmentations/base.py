"""The base of augmentations: each one changes which part of an image is decoded.

    (height, width) -> View of the whole image -> augmentation, augmentation ... -> View -> decoder

Nothing is resampled here: the decoder crops, resizes and mirrors once, however many augmentations
there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.common.component import Component

Size = tuple[int, int]  # (height, width) in pixels that the model sees


@dataclass(frozen=True)
class View:
    """A rectangle of an upright image in its own pixels, and whether it is mirrored."""

    top: float
    left: float
    height: float
    width: float
    is_mirrored: bool = False


class AugmentationBase(Component):
    """Settings and behaviour of one kind."""

    kind: str

    @property
    def num_draws(self) -> int:
        """Number of random numbers per sample."""
        raise NotImplementedError

    def apply(self, view: View, draws: Sequence[float], size: Size) -> View:
        """Return the new view.

        draws: `num_draws` numbers in [0, 1).
        """
        raise NotImplementedError
