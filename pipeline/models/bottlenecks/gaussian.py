"""A Gaussian with diagonal covariance as the posterior: variational autoencoders."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.common.precision import widen
from pipeline.models.bottlenecks.base import BottleneckBase, Posterior

# Log-variances are squashed smoothly into (-20, 20): gradients never vanish as behind a hard clamp,
# exp stays finite in float32, and near 0 the squashing is the identity to third order.
LOGVAR_BOUND = 20.0


class Gaussian(BottleneckBase):
    """q(z | x) = N(mu, diag sigma^2), reparametrised (Kingma and Welling 2014, section 2.4)."""

    kind: Literal["gaussian"] = "gaussian"

    @property
    def num_statistics(self) -> int:
        """A mean and a log-variance per latent channel."""
        return 2 * self.size

    def posterior(self, statistics: Tensor) -> Posterior:
        """Return the Gaussian whose mean and log-variance halve `statistics` [B, 2Z, ...]."""
        mu, raw_logvar = widen(statistics).chunk(2, dim=1)
        return Posterior(mu=mu, logvar=LOGVAR_BOUND * torch.tanh(raw_logvar / LOGVAR_BOUND))
