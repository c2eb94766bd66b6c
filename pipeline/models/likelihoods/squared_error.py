"""The squared error of the plain and the denoising autoencoder."""

from typing import Literal

from torch import Tensor

from pipeline.models.likelihoods.base import Learned, LikelihoodBase, Link, apply_link


class SquaredError(LikelihoodBase):
    """(x - mean)^2 per element; summed over an image, the loss of AE and DAE. Not in nats.

    It equals a Gaussian with sigma^2 = 1/2 without the constant. Models with a rate term should use
    `gaussian`, whose scale relative to the rate is explicit.
    """

    kind: Literal["squared_error"] = "squared_error"
    link: Link = "identity"  # from the decoder's output to the mean of each element

    def nll(self, decoded: Tensor, target: Tensor, learned: Learned) -> Tensor:
        del learned
        return (target - self.mean(decoded)).square()

    def mean(self, decoded: Tensor) -> Tensor:
        return apply_link(decoded, self.link)

    @property
    def is_nats(self) -> bool:
        """False: a squared error is not the logarithm of a probability."""
        return False
