"""What every bottleneck shares: the posterior q(z | x) that it makes, and its size.

# B samples, Z latent channels (vector latents [B, Z], spatial ones [B, Z, H, W])
"""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from pipeline.common import rng
from pipeline.common.component import Component


@dataclass(frozen=True)
class Posterior:
    """q(z | x): a point, or a Gaussian with diagonal covariance; float32 or float64."""

    mu: Tensor  # [B, *latent]
    logvar: Tensor | None  # [B, *latent]; None = all mass at mu

    def sample(self, keys: Tensor | None) -> Tensor:
        """Return z = mu + sigma * noise(keys); mu itself without keys [B] or without variance."""
        if keys is None or self.logvar is None:
            return self.mu
        noise = rng.normal(keys, self.mu.shape[1:]).to(self.mu.dtype)
        return self.mu + torch.exp(0.5 * self.logvar) * noise


class BottleneckBase(Component):
    """A kind of bottleneck over `size` latent channels."""

    size: int = Field(default=10, gt=0)  # latent channels Z

    @property
    def num_statistics(self) -> int:
        """Channels that the encoder must put out."""
        return self.size

    def posterior(self, statistics: Tensor) -> Posterior:
        """Return q(z | x) from the encoder's output `statistics` [B, num_statistics, ...]."""
        raise NotImplementedError
