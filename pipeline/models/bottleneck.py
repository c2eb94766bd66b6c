"""Bottlenecks: the encoder's output -> the posterior q(z | x) -> a latent z.

Add a kind: one class with `num_statistics`, `posterior` and `is_random`, and its name in the union.

# B samples, Z latent channels (vector latents [B, Z], spatial ones [B, Z, H, W])
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import rng
from pipeline.component import Component
from pipeline.precision import widen

# Log-variances are squashed smoothly into (-20, 20): gradients never vanish as behind a hard clamp,
# exp stays finite in float32, and near 0 the squashing is the identity to third order.
LOGVAR_BOUND = 20.0


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


class Deterministic(BottleneckBase):
    """z is the encoder's output: autoencoders without a rate."""

    kind: Literal["deterministic"] = "deterministic"

    def posterior(self, statistics: Tensor) -> Posterior:
        """Return the point posterior at `statistics` [B, Z, ...]."""
        return Posterior(mu=widen(statistics), logvar=None)


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


Bottleneck = Annotated[Deterministic | Gaussian, Field(discriminator="kind")]
