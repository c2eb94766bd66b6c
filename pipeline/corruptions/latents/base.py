"""What a transform of latents and targets offers."""

from torch import Tensor

from pipeline.common.component import Component


class LatentTransformBase(Component):
    """A kind of transform."""

    kind: str

    def apply(self, z: Tensor, target: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return z [B, *latent] and target [B, *event], both changed or neither.

        Their shapes may change. key: int64 [1], for random numbers; the same within a step.
        """
        raise NotImplementedError
