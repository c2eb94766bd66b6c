"""The interface of bottlenecks: settings, and the code computed from the encoder's output.

# B samples, Z latent channels (vector latents [B, Z], spatial ones [B, Z, H, W])
"""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.common import rng
from pipeline.common.component import Component
from pipeline.common.errors import UserError


# Modules return named tuples: ZeRO-3 finds tensors only in tuples, lists and dicts, and without
# tensors its hooks for the backward pass fail.
class Posterior(NamedTuple):
    """q(z | x): a point, or a Gaussian with diagonal covariance; float32 or float64."""

    mu: Tensor  # [B, *latent]
    logvar: Tensor | None  # [B, *latent]; None = all mass at mu

    def sample(self, keys: Tensor | None) -> Tensor:
        """Return z = mu + sigma * noise(keys); mu itself without keys [B] or without variance."""
        if keys is None or self.logvar is None:
            return self.mu
        noise = rng.normal(keys, self.mu.shape[1:]).to(self.mu.dtype)
        return self.mu + torch.exp(0.5 * self.logvar) * noise


class Code(NamedTuple):
    """The output of a bottleneck for B samples."""

    z: Tensor  # [B, *latent], the input of the decoder
    posterior: Posterior | None  # None: quantised codes have none
    ids: Tensor | None = None  # int64 [B, ...], entries of a codebook
    # Per image [B], by name: added to the loss as they are, and logged; None: none.
    penalties: dict[str, Tensor] | None = None

    def moments(self) -> dict[str, Tensor]:
        """Return mu and, where the posterior has one, logvar: what exports store.

        Raises UserError if there is no posterior.
        """
        if self.posterior is None:
            raise UserError(
                "The model's bottleneck gives codes without a posterior: their mean and variance, "
                "which exports hold, do not exist."
            )
        return {name: t for name, t in self.posterior._asdict().items() if t is not None}


class BottleneckBase(Component):
    """Settings of a bottleneck over `size` latent channels."""

    size: int = Field(default=10, gt=0)  # latent channels Z

    @property
    def num_statistics(self) -> int:
        """Number of output channels of the encoder."""
        return self.size

    @property
    def has_density(self) -> bool:
        """Whether the posterior is a density, so that it can be sampled and has a divergence."""
        return False

    def build(self) -> nn.Module:
        """Return the module (statistics [B, num_statistics, ...], keys int64 [B] | None) -> Code.

        keys: of the reparametrisation noise; without them z is the posterior's mean.
        """
        raise NotImplementedError
