"""An isotropic Gaussian around the decoder's mean, sigma fixed or learned."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.models.likelihoods.base import Learned, LikelihoodBase, Link, apply_link

# The lower bound of a learned log sigma: the softplus floor of Rybkin et al. 2021 ("Simple and
# effective VAE training with calibrated decoders", section 3), far under one grey level of 1/255.
LOG_SIGMA_FLOOR = -6.0


class GaussianLikelihood(LikelihoodBase):
    """-ln N(x; mean, sigma^2) per element, constants included.

    With sigma: learned, one sigma for all elements is trained with the weights.
    """

    kind: Literal["gaussian"] = "gaussian"
    # standard deviation, in units of the [0, 1] range
    sigma: Annotated[float, Field(gt=0)] | Literal["learned"] = "learned"
    link: Link = "identity"  # from the decoder's output to the mean of each element

    def initial(self) -> Learned:
        """Return log sigma before the softplus floor, at sigma = 1, if it is learned."""
        return {"raw_log_sigma": torch.zeros(1)} if self.sigma == "learned" else {}

    def log_sigma(self, learned: Learned) -> Tensor:
        """Return ln sigma [1], in float64 where it is a constant."""
        if self.sigma == "learned":
            return LOG_SIGMA_FLOOR + F.softplus(learned["raw_log_sigma"] - LOG_SIGMA_FLOOR)
        return torch.tensor([math.log(self.sigma)], dtype=torch.float64)

    def nll(self, decoded: Tensor, target: Tensor, learned: Learned) -> Tensor:
        """Return -ln p of every element [B, *event], in nats."""
        log_sigma = self.log_sigma(learned).to(decoded, non_blocking=True)
        scaled = (target - self.mean(decoded)) * torch.exp(-log_sigma)
        return 0.5 * scaled.square() + log_sigma + 0.5 * math.log(2.0 * math.pi)

    def mean(self, decoded: Tensor) -> Tensor:
        return apply_link(decoded, self.link)

    @property
    def is_density(self) -> bool:
        return True

    def sigma2(self, learned: Learned) -> Tensor:
        return torch.exp(2.0 * self.log_sigma(learned))
