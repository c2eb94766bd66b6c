"""The rate of a variational autoencoder."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.losses.terms.base import Networks, Reconstruction, TermBase
from pipeline.models.bottlenecks import Posterior


def gaussian_kl(posterior: Posterior) -> Tensor:
    """Return KL(N(mu, sigma^2) || N(0, 1)) of every latent element [B, *latent], in nats.

    Kingma and Welling 2014, appendix B; expm1 is accurate for small log-variances.
    """
    assert posterior.logvar is not None
    return 0.5 * (posterior.mu.square() + torch.expm1(posterior.logvar) - posterior.logvar)


class Kl(TermBase):
    """KL(q(z | x) || N(0, I)) in closed form; `weight` is beta (Higgins et al. 2017, eq. 4)."""

    kind: Literal["kl"] = "kl"

    @property
    def needs_density(self) -> bool:
        """True: a point has no density, and so no divergence."""
        return True

    def per_image(self, r: Reconstruction, networks: Networks) -> Tensor:
        del networks
        assert r.posterior is not None
        return gaussian_kl(r.posterior).flatten(1).sum(1)
