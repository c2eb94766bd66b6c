"""The squared error of the plain and the denoising autoencoder."""

from typing import Literal

from torch import Tensor

from pipeline.models.likelihoods.base import Learned, LikelihoodBase, Link, apply_link


class SquaredError(LikelihoodBase):
    """(x - mean)^2 per element; summed over an image, the loss of AE and DAE. Not in nats.

    It is a Gaussian with sigma^2 = 1/2 without its constant (models with a rate term should say
    `gaussian` instead, whose scale against the rate is then visible).
    """

    kind: Literal["squared_error"] = "squared_error"
    link: Link = "identity"  # from the decoder's output to the mean of each element

    def nll(self, decoded: Tensor, target: Tensor, learned: Learned) -> Tensor:
        """Return the squared error of every element [B, *event]."""
        del learned
        return (target - self.mean(decoded)).square()

    def mean(self, decoded: Tensor) -> Tensor:
        """Return the reconstruction [B, *event]."""
        return apply_link(decoded, self.link)

    @property
    def is_nats(self) -> bool:
        """A squared error is no logarithm of a probability."""
        return False
