"""The objective: distortion + sum of weighted regularisers, one number per image.

    loss_i = sum over elements of w_e * nll(x | z)_e  +  sum_k weight_k(t) * R_k(q(z | x_i))

Sums over an image, never means: then beta multiplies what the formula says it multiplies, whatever
the resolution. The mean over images is the caller's (`training.step`, `monitoring.meter`).

# B samples
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from pipeline.common.component import Component
from pipeline.common.precision import widen
from pipeline.losses.terms import Regulariser, gaussian_kl
from pipeline.models.autoencoder import Output
from pipeline.models.bottlenecks import Posterior
from pipeline.models.likelihoods import Likelihood


class Emphasis(Component):
    """Weights of corrupted and untouched elements (Vincent et al. 2010, section 5.1)."""

    corrupted: float = Field(default=1.0, ge=0)
    untouched: float = Field(default=1.0, ge=0)

    @property
    def is_neutral(self) -> bool:
        """Whether all elements count alike."""
        return self.corrupted == self.untouched == 1.0

    def apply(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        """Weight elements [B, *event] by whether `mask` marks them as corrupted."""
        untouched = elements * self.untouched
        return untouched if mask is None else untouched.where(~mask, elements * self.corrupted)


class Objective(Component):
    """What training minimises."""

    emphasis: Emphasis = Emphasis()
    regularisers: tuple[Regulariser, ...] = ()

    def weights_at(self, samples: int) -> tuple[float, ...]:
        """Return each regulariser's weight when `samples` samples have been seen."""
        return tuple(term.weight_at(samples) for term in self.regularisers)


@dataclass(frozen=True)
class Losses:
    """Per image, float32 or float64 [B]; nats, or squared error where the likelihood is that."""

    total: Tensor
    distortion: Tensor  # with emphasis
    nll: Tensor  # without
    regularisers: dict[str, Tensor]  # by kind, unweighted
    squared_error: Tensor  # sum over elements of (x - mean)^2, whatever the likelihood


def per_image_losses(
    output: Output,
    target: Tensor,
    *,
    likelihood: Likelihood,
    objective: Objective,
    weights: Sequence[float],
    mask: Tensor | None,
) -> Losses:
    """Return the losses of every image against the clean `target` [B, *event] in [0, 1].

    weights: one per regulariser, from `Objective.weights_at`. mask: bool [B, *event], the corrupted
    elements; None counts every element as untouched.
    """
    assert output.decoded is not None
    assert output.posterior is not None
    target = widen(target).to(output.decoded.dtype)
    elements = likelihood.nll(output.decoded, target, output.learned)
    nll = elements.flatten(1).sum(1)
    distortion = nll
    if not objective.emphasis.is_neutral:
        distortion = objective.emphasis.apply(elements, mask).flatten(1).sum(1)
    total = distortion
    terms: dict[str, Tensor] = {}
    for term, weight in zip(objective.regularisers, weights, strict=True):
        terms[term.kind] = term.per_image(output.posterior)
        total = total + weight * terms[term.kind]
    error = (target - likelihood.mean(output.decoded.detach())).square().flatten(1).sum(1)
    return Losses(total, distortion, nll, terms, error)


def negative_elbo(losses: Losses, posterior: Posterior) -> Tensor:
    """Return the bound on -ln p(x) of every image [B] in nats: nll + KL, both with weight 1."""
    return losses.nll + gaussian_kl(posterior).flatten(1).sum(1)


def bits_per_dimension(nats_per_image: float, num_elements: int) -> float:
    """Convert the nats of a density over [0, 1] values to bits per element of 8-bit data.

    The density over grey levels 0..255 is 1/256 of it: 8 bits more.
    """
    return nats_per_image / (num_elements * math.log(2.0)) + 8.0
