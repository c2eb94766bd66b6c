"""A Gaussian with diagonal covariance as the posterior: variational autoencoders."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.common.precision import widen
from pipeline.models.bottlenecks.base import BottleneckBase, Code, Posterior

# Log-variances are squashed smoothly into (-20, 20): unlike with a hard clamp, gradients never
# vanish; exp stays finite in float32; near 0 the squashing is the identity to third order.
LOGVAR_BOUND = 20.0
# The hard bounds of diffusers and latent diffusion, whose weights reach below -17.
LOGVAR_CLAMP = (-30.0, 20.0)

LogvarBound = Literal["tanh", "clamp"]


class Gaussian(BottleneckBase):
    """q(z | x) = N(mu, diag sigma^2), reparametrised (Kingma and Welling 2014, section 2.4)."""

    kind: Literal["gaussian"] = "gaussian"
    # How log-variances are bounded: tanh, smoothly within (-20, 20); clamp, cut to [-30, 20] as the
    # published autoencoders of latent diffusion have it.
    logvar: Annotated[LogvarBound, Field(exclude_if=lambda it: it == "tanh")] = "tanh"

    @property
    def num_statistics(self) -> int:
        """A mean and a log-variance per latent channel."""
        return 2 * self.size

    @property
    def has_density(self) -> bool:
        return True

    def build(self) -> nn.Module:
        return GaussianCode(is_clamped=self.logvar == "clamp")


class GaussianCode(nn.Module):
    """Mean and log-variance, one half of the channels each, and a sample from that Gaussian."""

    def __init__(self, *, is_clamped: bool) -> None:
        """is_clamped: cut the log-variance to LOGVAR_CLAMP, instead of squashing it."""
        super().__init__()
        self._is_clamped = is_clamped

    def forward(self, statistics: Tensor, keys: Tensor | None = None) -> Code:
        """Return the Gaussian that `statistics` [B, 2Z, ...] hold; see `BottleneckBase.build`."""
        mu, raw_logvar = widen(statistics).chunk(2, dim=1)
        if self._is_clamped:
            logvar = raw_logvar.clamp(*LOGVAR_CLAMP)
        else:
            logvar = LOGVAR_BOUND * torch.tanh(raw_logvar / LOGVAR_BOUND)
        posterior = Posterior(mu, logvar)
        return Code(posterior.sample(keys), posterior)
