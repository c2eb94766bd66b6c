"""Transforms of latents and targets, in training only: between sampling and decoding.

    z [B, *latent], target [B, *event], key of the step -> z, target

Latent and target change together, which trains the decoder to be equivariant. All images of a step
get the same transform, in all micro-batches and on all processes.

Add a kind: one file with a `LatentTransformBase`, and its name below.
"""

from collections.abc import Sequence

from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions.latents.base import LatentTransformBase

# The list of transforms in a config. There is no kind yet; with the first one it becomes
# tuple[Annotated[First, Field(discriminator="kind")], ...].
LatentTransforms = tuple[()]


def transform(
    z: Tensor, target: Tensor, transforms: Sequence[LatentTransformBase], key: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the transforms in order; each draws from a stream of its own."""
    for index, one in enumerate(transforms):
        z, target = one.apply(z, target, rng.substream(key, f"{index}/{one.kind}"))
    return z, target
