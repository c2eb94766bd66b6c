"""Corruptions: clean batch in [0, 1] and one key per sample -> corrupted batch and mask.

Add a kind: one file with a Component whose `__call__(x, keys) -> Corrupted`, and its name below.
A kind for some event shapes only checks them in `check_event`.

# B samples; event = the shape of one sample
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions.base import Corrupted
from pipeline.corruptions.gaussian_noise import GaussianNoise
from pipeline.corruptions.masking import Masking
from pipeline.corruptions.patch_mask import PatchMask
from pipeline.corruptions.salt_and_pepper import SaltAndPepper

Corruption = Annotated[
    GaussianNoise | Masking | SaltAndPepper | PatchMask, Field(discriminator="kind")
]


def corrupt(x: Tensor, corruptions: Sequence[Corruption], keys: Tensor) -> Corrupted:
    """Apply the corruptions one after the other to x [B, *event]; the mask is the union of theirs.

    `keys` int64 [B] come from `rng.sample_keys`; equal corruptions at two positions in the
    list draw different noise.
    """
    mask: Tensor | None = None
    for index, corruption in enumerate(corruptions):
        x, added = corruption(x, rng.substream(keys, f"{index}/{corruption.kind}"))
        if added is not None:
            mask = added if mask is None else mask | added
    return Corrupted(x, mask)
