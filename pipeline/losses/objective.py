"""The objective: distortion + sum of weighted terms + penalties, one number per image.

    loss_i = sum over elements of w_e * nll(x | z)_e  +  sum_k weight_k(t) * R_k(image i)
           + the penalties of the bottleneck

Losses are sums over an image, never means, so that beta has its meaning from the formula at any
resolution. The caller averages over images (`training.step`, `monitoring.meter`).

# B samples
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.common.component import Component
from pipeline.common.precision import widen
from pipeline.losses.terms import (
    AdversarialTerm,
    Game,
    Networks,
    Reconstruction,
    Term,
    TermBase,
    gaussian_kl,
)
from pipeline.models.autoencoder import ModelOutput
from pipeline.models.bottlenecks import Posterior
from pipeline.models.likelihoods import Likelihood

N = TypeVar("N", float, Tensor)


class Gather(Protocol):
    """Gathers the rows of all processes: [B, ...] of each -> [processes * B, ...].

    Rows are sorted by rank, and so by slot. The gradient of a row is summed over all processes and
    returned to the process that owns it. A collective operation.
    """

    @property
    def rank(self) -> int:
        """The rank of this process, whose rows are [rank * B, (rank + 1) * B)."""
        ...

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes."""
        ...


class Emphasis(Component):
    """Weights of corrupted and untouched elements (Vincent et al. 2010, section 5.1)."""

    corrupted: float = Field(default=1.0, ge=0)  # factor of the distortion where the mask is set
    untouched: float = Field(default=1.0, ge=0)  # factor of the distortion everywhere else

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
    regularisers: tuple[Term, ...] = ()

    def weights_at(self, samples: int) -> dict[str, float]:
        """Return the weights when `samples` samples have been seen: of each term, by its kind."""
        weights: dict[str, float] = {}
        for term in self.regularisers:
            weights[term.kind] = term.weight_at(samples)
            if isinstance(term, AdversarialTerm):
                weights["discriminator"] = term.discriminator_weight_at(samples)
        return weights

    @property
    def adversarial(self) -> AdversarialTerm | None:
        """The adversarial term, if there is one."""
        found = [term for term in self.regularisers if isinstance(term, AdversarialTerm)]
        return found[0] if found else None


@dataclass(frozen=True)
class Losses:
    """Per image, float32 or float64 [B]; nats, or squared error where the likelihood is that."""

    total: Tensor
    distortion: Tensor  # with emphasis
    nll: Tensor  # without
    terms: dict[str, Tensor]  # by kind, unweighted; and the bottleneck's penalties
    squared_error: Tensor  # sum over elements of (x - mean)^2, for any likelihood


def per_image_losses(
    output: ModelOutput,
    target: Tensor,
    *,
    likelihood: Likelihood,
    objective: Objective,
    weights: Mapping[str, float],
    mask: Tensor | None,
    counted: Tensor,
    networks: Networks,
    gather: Gather,
    game: Game | None = None,
) -> Losses:
    """Return the losses of every image against the clean `target` [B, *event] in [0, 1].

    weights: from `Objective.weights_at`. mask: bool [B, *event], the corrupted
    elements; None counts every element as untouched. counted: bool [B], False where a slot holds no
    sample. networks: frozen networks that the terms name. gather: see `Gather`. game: of the
    adversarial term, which is left out without it.
    """
    assert output.decoded is not None
    assert output.code is not None
    target = widen(target).to(output.decoded.dtype)
    elements = likelihood.nll(output.decoded, target, output.learned)
    nll = elements.flatten(1).sum(1)
    distortion = nll
    if not objective.emphasis.is_neutral:
        distortion = objective.emphasis.apply(elements, mask).flatten(1).sum(1)
    total = distortion
    mean = likelihood.mean(output.decoded)
    code = output.code
    r = Reconstruction(target, mean, output.decoded, mask, code.posterior, code.z, code.ids)
    terms: dict[str, Tensor] = {}
    for term in objective.regularisers:
        if isinstance(term, AdversarialTerm):
            if game is None:
                continue
            value, own = _adversarial_loss(term, mean, game)
            terms["discriminator"] = own
            # The value must not change the loss: only its gradient is needed.
            total = total + weights["discriminator"] * (own - own.detach())
        elif term.scope == "image":
            value = term.per_image(r, networks)
        else:
            among = gather if term.scope == "global_batch" else None
            value = _over_batch(term, r, counted, networks, among)
        terms[term.kind] = value
        total = total + weights[term.kind] * value
    for name, penalty in (code.penalties or {}).items():
        terms[name] = penalty
        total = total + penalty
    error = (target - mean.detach()).square().flatten(1).sum(1)
    return Losses(total, distortion, nll, terms, error)


def _adversarial_loss(term: AdversarialTerm, mean: Tensor, game: Game) -> tuple[Tensor, Tensor]:
    """Return the losses [B] of the generator, with its gradient at `mean`, and discriminator."""
    own = term.discriminator_loss(game.real, game.fake)
    if game.generator is None:
        return torch.zeros_like(own), own
    loss, gradient = game.generator
    carrier = (mean * gradient).flatten(1).sum(1)
    return carrier - carrier.detach() + loss, own


def _over_batch(
    term: TermBase, r: Reconstruction, counted: Tensor, networks: Networks, gather: Gather | None
) -> Tensor:
    """Return the term of this process's images [B], computed without slots that hold no sample.

    gather: None = over the images of this process only.
    """
    if gather is None:
        batch, start = counted, 0
        values = term.per_image(r.fetched(lambda rows: rows[batch]), networks)
    else:
        batch, start = gather(counted), gather.rank * len(counted)
        values = term.per_image(r.fetched(lambda rows: gather(rows)[batch]), networks)
    everywhere = values.new_zeros(len(batch)).masked_scatter(batch, values)
    return everywhere[start : start + len(counted)]


def negative_elbo(losses: Losses, posterior: Posterior) -> Tensor:
    """Return the bound on -ln p(x) of every image [B] in nats: nll + KL, both with weight 1."""
    return losses.nll + gaussian_kl(posterior).flatten(1).sum(1)


def bits_per_dimension(nats_per_image: N, num_elements: int, value_bits: int = 8) -> N:
    """Convert the nats of a density over [0, 1] values to bits per element of 8- or 16-bit data.

    The density over grey levels 0..255 is 1/256 of it: 8 bits more.
    """
    return nats_per_image / (num_elements * math.log(2.0)) + value_bits
