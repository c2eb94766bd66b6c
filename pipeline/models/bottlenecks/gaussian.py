"""A Gaussian with diagonal covariance as the posterior: variational autoencoders."""

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.common.precision import widen
from pipeline.models.bottlenecks.base import BottleneckBase, Code, Posterior

# Log-variances are squashed smoothly into (-20, 20): unlike with a hard clamp, gradients never
# vanish; exp stays finite in float32; near 0 the squashing is the identity to third order.
LOGVAR_BOUND = 20.0


class Gaussian(BottleneckBase):
    """q(z | x) = N(mu, diag sigma^2), reparametrised (Kingma and Welling 2014, section 2.4)."""

    kind: Literal["gaussian"] = "gaussian"

    @property
    def num_statistics(self) -> int:
        """A mean and a log-variance per latent channel."""
        return 2 * self.size

    @property
    def has_density(self) -> bool:
        return True

    def build(self) -> nn.Module:
        return GaussianCode()


class GaussianCode(nn.Module):
    """Mean and log-variance, one half of the channels each, and a sample from that Gaussian."""

    def forward(self, statistics: Tensor, keys: Tensor | None = None) -> Code:
        """Return the Gaussian that `statistics` [B, 2Z, ...] hold; see `BottleneckBase.build`."""
        mu, raw_logvar = widen(statistics).chunk(2, dim=1)
        posterior = Posterior(mu, LOGVAR_BOUND * torch.tanh(raw_logvar / LOGVAR_BOUND))
        return Code(posterior.sample(keys), posterior)
