"""Every likelihood against torch.distributions or brute force, in float64."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.models.likelihoods import (
    Bernoulli,
    GaussianLikelihood,
    Likelihood,
    LikelihoodBase,
    SquaredError,
)

KINDS: tuple[type[LikelihoodBase], ...] = get_args(get_args(Likelihood)[0])
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def decoded_and_target() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    decoded = 3 * torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64)
    return decoded, torch.rand(5, 2, 4, 4, generator=generator, dtype=torch.float64)


@each_kind
def test_contract(kind: type[LikelihoodBase]) -> None:
    likelihood = kind()
    decoded, target = decoded_and_target()
    decoded.requires_grad_()
    learned = {name: value.requires_grad_() for name, value in likelihood.initial().items()}
    assert all(value.ndim >= 1 for value in learned.values())
    nll = likelihood.nll(decoded, target, learned)
    assert nll.shape == target.shape
    assert nll.dtype == torch.float64
    nll.sum().backward()
    for leaf in (decoded, *learned.values()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0
    mean = likelihood.mean(decoded)
    assert mean.shape == target.shape
    exact = torch.logit(target)
    if getattr(likelihood, "link", "sigmoid") == "identity":
        exact = target
    torch.testing.assert_close(likelihood.mean(exact), target)
    best = likelihood.nll(exact, target, learned)
    assert (best <= nll + 1e-12).all(), "the decoder that hits the target is the best one"


def test_squared_error() -> None:
    decoded, target = decoded_and_target()
    expected = [
        (x - 1 / (1 + math.exp(-d))) ** 2
        for x, d in zip(target.flatten().tolist(), decoded.flatten().tolist(), strict=True)
    ]
    found = SquaredError(link="sigmoid").nll(decoded, target, {}).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.05, 1.0, 3.0])
def test_gaussian_with_fixed_sigma(sigma: float) -> None:
    decoded, target = decoded_and_target()
    expected = -torch.distributions.Normal(torch.sigmoid(decoded), sigma).log_prob(target)
    found = GaussianLikelihood(sigma=sigma, link="sigmoid").nll(decoded, target, {})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    identity = GaussianLikelihood(sigma=sigma, link="identity").nll(decoded, target, {})
    expected = -torch.distributions.Normal(decoded, sigma).log_prob(target)
    torch.testing.assert_close(identity, expected, rtol=1e-12, atol=1e-12)


def test_gaussian_with_learned_sigma() -> None:
    likelihood = GaussianLikelihood(sigma="learned", link="sigmoid")
    decoded, target = decoded_and_target()
    learned = {"raw_log_sigma": torch.tensor([-1.5], dtype=torch.float64)}
    sigma = likelihood.sigma2(learned).sqrt()
    assert abs(sigma.log().item() + 1.5) < 0.02, "far above the floor it is the raw value"
    expected = -torch.distributions.Normal(torch.sigmoid(decoded), sigma).log_prob(target)
    torch.testing.assert_close(likelihood.nll(decoded, target, learned), expected)
    tiny = {"raw_log_sigma": torch.tensor([-100.0])}
    assert likelihood.sigma2(tiny).item() == pytest.approx(math.exp(-12), rel=1e-3)


def test_learned_sigma_finds_the_mean_squared_error() -> None:
    likelihood = GaussianLikelihood(sigma="learned", link="sigmoid")
    decoded, target = decoded_and_target()
    raw = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=100, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihood.nll(decoded, target, {"raw_log_sigma": raw}).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    error = (torch.sigmoid(decoded) - target).square().mean().item()
    found = likelihood.sigma2({"raw_log_sigma": raw.detach()}).item()
    assert found == pytest.approx(error, rel=1e-5)


def test_bernoulli() -> None:
    decoded, target = decoded_and_target()
    binary = (target > 0.5).double()
    expected = -torch.distributions.Bernoulli(logits=decoded).log_prob(binary)
    torch.testing.assert_close(Bernoulli().nll(decoded, binary, {}), expected)
    p = torch.sigmoid(decoded)
    cross_entropy = -(target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(Bernoulli().nll(decoded, target, {}), cross_entropy)
    extreme = torch.tensor([[1000.0], [-1000.0]], dtype=torch.float64)
    assert Bernoulli().nll(extreme, torch.zeros(2, 1, dtype=torch.float64), {}).isfinite().all()


def test_what_is_a_density_and_what_is_in_nats() -> None:
    assert [
        (k().is_nats, k().is_density) for k in (SquaredError, GaussianLikelihood, Bernoulli)
    ] == [
        (False, False),
        (True, True),
        (True, False),
    ]
