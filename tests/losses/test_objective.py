"""The objective against brute force, closed forms and the identity behind the ELBO."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.common.schedules import LinearSchedule, WarmupCosine, value_at
from pipeline.distributed.gather import RowGather
from pipeline.losses.objective import (
    Emphasis,
    Losses,
    Objective,
    _over_batch,
    bits_per_dimension,
    negative_elbo,
    per_image_losses,
)
from pipeline.losses.terms import Kl, Reconstruction, TermBase, gaussian_kl
from pipeline.models.autoencoder import ModelConfig, ModelOutput, build_autoencoder
from pipeline.models.bottlenecks import Code, Posterior
from pipeline.models.likelihoods import Bernoulli, GaussianLikelihood, LikelihoodBase, SquaredError

B, EVENT, Z = 6, (2, 3, 3), 4


def output() -> ModelOutput:
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(B, Z, generator=generator, dtype=torch.float64)
    logvar = torch.randn(B, Z, generator=generator, dtype=torch.float64)
    decoded = torch.randn(B, *EVENT, generator=generator, dtype=torch.float64)
    return ModelOutput(Code(mu, Posterior(mu, logvar)), decoded, {})


def target() -> Tensor:
    return torch.rand(B, *EVENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses(
    likelihood: LikelihoodBase, objective: Objective, *, samples: int = 0, mask: Any = None
) -> Losses:
    return per_image_losses(
        output(),
        target(),
        likelihood=likelihood,  # pyright: ignore[reportArgumentType]
        objective=objective,
        weights=objective.weights_at(samples),
        mask=mask,
        counted=torch.ones(B, dtype=torch.bool),
        networks={},
        gather=RowGather(),
    )


def test_distortion_is_a_sum_over_the_image() -> None:
    found = losses(SquaredError(link="sigmoid"), Objective())
    decoded, x = output().decoded, target()
    assert decoded is not None
    for i in range(B):
        pairs = zip(x[i].flatten().tolist(), decoded[i].flatten().tolist(), strict=True)
        expected = sum((a - 1 / (1 + math.exp(-b))) ** 2 for a, b in pairs)
        assert found.distortion[i].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(found.total, found.distortion)
    torch.testing.assert_close(found.squared_error, found.distortion)


@pytest.mark.parametrize("likelihood", [SquaredError(), GaussianLikelihood(sigma=0.3), Bernoulli()])
def test_beta_multiplies_the_kl_and_nothing_else(likelihood: LikelihoodBase) -> None:
    plain = losses(likelihood, Objective())
    for beta in (0.0, 1.0, 4.0):
        found = losses(likelihood, Objective(regularisers=(Kl(weight=beta),)))
        assert torch.equal(found.distortion, plain.distortion)
        torch.testing.assert_close(found.total, plain.distortion + beta * found.terms["kl"])


def test_kl_equals_torch_distributions() -> None:
    posterior = output().posterior
    assert posterior is not None
    assert posterior.logvar is not None
    q = torch.distributions.Normal(posterior.mu, torch.exp(0.5 * posterior.logvar))
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(posterior), expected, rtol=1e-12, atol=1e-12)
    found = losses(SquaredError(), Objective(regularisers=(Kl(),))).terms["kl"]
    torch.testing.assert_close(found, expected.sum(1), rtol=1e-12, atol=1e-12)


def test_kl_equals_a_monte_carlo_estimate() -> None:
    mu, logvar = torch.tensor([[0.7]]).double(), torch.tensor([[-1.2]]).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, 1, generator=generator, dtype=torch.float64)
    z = mu + torch.exp(0.5 * logvar) * noise
    q = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
    difference = q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)
    standard_error = difference.std().item() / math.sqrt(len(z))
    assert abs(difference.mean().item() - gaussian_kl(Posterior(mu, logvar)).item()) < (
        5 * standard_error
    )


def test_emphasis_weighs_corrupted_elements() -> None:
    mask = torch.rand(B, *EVENT, generator=torch.Generator().manual_seed(2)) < 0.5
    objective = Objective(emphasis=Emphasis(corrupted=1.0, untouched=0.25))
    found = losses(SquaredError(link="sigmoid"), objective, mask=mask)
    decoded = output().decoded
    assert decoded is not None
    error = (target() - torch.sigmoid(decoded)).square()
    expected = (error * torch.where(mask, 1.0, 0.25)).flatten(1).sum(1)
    torch.testing.assert_close(found.distortion, expected)
    torch.testing.assert_close(found.nll, error.flatten(1).sum(1))
    unmarked = losses(SquaredError(link="sigmoid"), objective, mask=None)
    torch.testing.assert_close(unmarked.distortion, 0.25 * found.nll)


def linear_gaussian() -> tuple[Any, float]:
    """A model with linear maps on both sides, p(x | z) = N(W z + b, sigma^2)."""
    sigma = 0.7
    config = ModelConfig.model_validate(
        {
            "backbone": {"kind": "mlp", "hidden": []},
            "bottleneck": {"kind": "gaussian", "size": 3},
            "likelihood": {"kind": "gaussian", "sigma": sigma, "link": "identity"},
        }
    )
    return build_autoencoder(config, (5,), seed=0, dtype=torch.float64), sigma


def test_both_lines_of_the_vae_loss_are_equal_in_a_linear_gaussian_model() -> None:
    """KL(q(z|x) || p(z|x)) - ln p(x)  =  E_q[-ln p(x|z)] + KL(q(z|x) || p(z)), to 1e-10.

    The left side in closed form from the decoder's matrix; the right side by our own code, its
    expectation exact: the integrand is quadratic in z, and the 2 Z points mu +- sqrt(Z) sigma_i e_i
    with equal weights integrate quadratics exactly.
    """
    model, sigma = linear_gaussian()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        posterior = model(x, mode="encode").posterior
        deviation = torch.exp(0.5 * posterior.logvar)
        num_latents = posterior.mu.shape[1]
        second = gaussian_kl(posterior).sum(1)
        for i in range(num_latents):
            for sign in (-1.0, 1.0):
                step = torch.zeros_like(posterior.mu)
                step[:, i] = sign * math.sqrt(num_latents) * deviation[:, i]
                output = model(posterior.mu + step, mode="decode")
                nll = model.config.likelihood.nll(output.decoded, x, output.learned).sum(1)
                second = second + nll / (2 * num_latents)

        matrix, offset = model.decoder[0].weight, model.decoder[0].bias
        marginal = torch.distributions.MultivariateNormal(
            offset, matrix @ matrix.T + sigma**2 * torch.eye(5, dtype=torch.float64)
        )
        precision = torch.eye(num_latents, dtype=torch.float64) + matrix.T @ matrix / sigma**2
        covariance = torch.linalg.inv(precision)
        mean = (x - offset) @ matrix @ covariance.T / sigma**2
        q = torch.distributions.MultivariateNormal(posterior.mu, torch.diag_embed(deviation**2))
        p = torch.distributions.MultivariateNormal(mean, covariance)
        first = torch.distributions.kl_divergence(q, p) - marginal.log_prob(x)
    torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-10)


def test_negative_elbo_has_weight_one_whatever_beta_is() -> None:
    found = losses(Bernoulli(), Objective(regularisers=(Kl(weight=4.0),)))
    posterior = output().posterior
    assert posterior is not None
    expected = found.distortion + found.terms["kl"]
    torch.testing.assert_close(negative_elbo(found, posterior), expected)


def test_bits_per_dimension_of_a_uniform_density_is_eight() -> None:
    assert bits_per_dimension(0.0, 100) == 8.0
    assert bits_per_dimension(0.0, 100, value_bits=16) == 16.0
    assert bits_per_dimension(100 * math.log(2), 100) == pytest.approx(9.0)


def test_linear_schedule() -> None:
    schedule = LinearSchedule(start=1.0, end=4.0, over_samples=100)
    assert [schedule.at(n) for n in (0, 50, 100, 10_000)] == [1.0, 2.5, 4.0, 4.0]
    assert value_at(2.0, 12345) == 2.0
    objective = Objective(regularisers=(Kl(weight=schedule),))
    assert objective.weights_at(50) == {"kl": 2.5}


def test_learning_rate_schedule() -> None:
    rate = WarmupCosine(peak=1.0, final=0.1, warmup_samples=10)
    assert rate.at(0, total_samples=110) == 0.0
    assert rate.at(5, total_samples=110) == 0.5
    assert rate.at(10, total_samples=110) == 1.0
    assert rate.at(60, total_samples=110) == pytest.approx(0.55)
    assert rate.at(110, total_samples=110) == pytest.approx(0.1)


class Centred(TermBase):
    """Of an image: how far its latent is from the mean of the micro-batch."""

    kind: str = "centred"

    @property
    def scope(self):
        return "micro_batch"

    def per_image(self, r, networks):
        del networks
        return (r.z - r.z.mean(0)).square().sum(1)


def test_a_slot_without_a_sample_is_no_part_of_a_micro_batch():
    z = torch.tensor([[1.0], [math.nan], [5.0]], requires_grad=True)
    r = Reconstruction(z, z, z, None, None, z, None)
    values = _over_batch(Centred(), r, torch.tensor([True, False, True]), {}, None)
    assert values.tolist() == [4.0, 0.0, 4.0]
    values.sum().backward()
    assert z.grad is not None
    assert z.grad.flatten().tolist() == [-4.0, 0.0, 4.0]
