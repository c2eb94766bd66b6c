"""Backbones, bottlenecks and the autoencoder: shapes, parameter counts, gradients, determinism."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.losses.terms import gaussian_kl
from pipeline.models.autoencoder import ModelConfig, build_autoencoder, num_parameters
from pipeline.models.backbones import Backbone, BackboneBase, Burgess, Mlp
from pipeline.models.bottlenecks import LOGVAR_BOUND, Deterministic, Gaussian, Posterior

BACKBONES: tuple[type[BackboneBase], ...] = get_args(get_args(Backbone)[0])
SHAPES = [(1, 64, 64), (3, 64, 64), (3, 32, 32)]


def build(event_shape: tuple[int, ...], **config: Any) -> Any:
    model_config = ModelConfig.model_validate(config)
    return build_autoencoder(model_config, event_shape, seed=0, dtype=torch.float32)


def keys(num: int) -> Tensor:
    return torch.arange(num) * 7919


@pytest.mark.parametrize("event_shape", SHAPES)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("bottleneck", ["deterministic", "gaussian"])
@pytest.mark.parametrize("likelihood", ["squared_error", "gaussian", "bernoulli"])
def test_contract(
    backbone: type[BackboneBase], bottleneck: str, likelihood: str, event_shape: tuple[int, ...]
) -> None:
    model = build(
        event_shape,
        backbone={"kind": backbone().kind},
        bottleneck={"kind": bottleneck, "size": 6},
        likelihood={"kind": likelihood},
    )
    x = torch.rand(4, *event_shape)
    output = model(x, keys=keys(4))
    assert output.decoded.shape == x.shape
    assert output.z.shape == (4, *model.latent_shape)
    assert output.posterior.mu.shape == output.z.shape
    assert all(parameter.ndim >= 1 for parameter in model.parameters())
    loss = model.config.likelihood.nll(output.decoded, x, output.learned).sum()
    if output.posterior.logvar is not None:
        loss = loss + gaussian_kl(output.posterior).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    again = model(x, keys=keys(4))
    assert torch.equal(again.decoded, output.decoded)
    encoded = model(x, mode="encode")
    assert torch.equal(encoded.posterior.mu, output.posterior.mu)
    assert encoded.decoded is None
    decoded = model(output.z, mode="decode")
    assert torch.equal(decoded.decoded, output.decoded)


@pytest.mark.parametrize("likelihood", ["squared_error", "gaussian", "bernoulli"])
@pytest.mark.parametrize("backbone", ["mlp", "burgess"])
def test_latents_become_pictures(backbone: str, likelihood: str) -> None:
    model = build(
        (3, 32, 32), backbone={"kind": backbone}, likelihood={"kind": likelihood}
    ).requires_grad_(False)
    posterior = model(torch.rand(4, 3, 32, 32), mode="encode").posterior
    for z in (posterior.mu, posterior.sample(keys(4)), 1e3 * torch.randn(4, *model.latent_shape)):
        x = model.reconstruct(z)
        assert x.shape == (4, 3, 32, 32)
        assert x.min() >= 0
        assert x.max() <= 1
        mean = model.config.likelihood.mean(model(z, mode="decode").decoded)
        inside = (mean >= 0) & (mean <= 1)
        assert torch.equal(x[inside], mean[inside])
        assert torch.equal(x[~inside], (mean[~inside] > 1).float())
    if likelihood == "squared_error":
        assert not inside.all()  # an identity link leaves [0, 1], and the picture does not


@pytest.mark.parametrize(("channels", "expected"), [(1, 502_005), (3, 504_055)])
def test_burgess_has_the_published_number_of_parameters(channels: int, expected: int) -> None:
    model = build((channels, 64, 64), likelihood={"kind": "bernoulli"})
    assert num_parameters(model) == expected


def test_burgess_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="data.decode.size"):
        Burgess().check_event((1, 48, 48))
    with pytest.raises(ValueError, match="burgess takes images"):
        Burgess().check_event((100,))


def test_mlp_takes_any_event() -> None:
    model = build((7,), backbone={"kind": "mlp", "hidden": [5]}, bottleneck={"kind": "gaussian"})
    assert model(torch.rand(3, 7), keys=keys(3)).decoded.shape == (3, 7)
    with pytest.raises(UserError, match="hidden.0: must be greater than 0"):
        Mlp(hidden=(0,))


def test_weights_depend_on_the_seed_alone() -> None:
    config = ModelConfig()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = build_autoencoder(config, (1, 64, 64), seed=3, dtype=torch.float32).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    b = build_autoencoder(config, (1, 64, 64), seed=3, dtype=torch.float32).state_dict()
    c = build_autoencoder(config, (1, 64, 64), seed=4, dtype=torch.float32).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.0.weight"], c["encoder.0.weight"])


def test_reparametrisation() -> None:
    mu = torch.tensor([[1.0, -2.0]]).expand(20_000, 2)
    logvar = torch.tensor([[0.0, -2.0]]).expand(20_000, 2)
    posterior = Posterior(mu=mu, logvar=logvar)
    z = posterior.sample(keys(20_000)).double()
    for column, (mean, sigma) in enumerate(((1.0, 1.0), (-2.0, math.exp(-1.0)))):
        assert abs(z[:, column].mean().item() - mean) < 5 * sigma / math.sqrt(20_000)
        assert abs(z[:, column].std().item() - sigma) < 5 * sigma / math.sqrt(40_000)
    assert posterior.sample(None) is mu
    assert Posterior(mu=mu, logvar=None).sample(keys(20_000)) is mu


def test_gradients_flow_through_the_sample() -> None:
    statistics = torch.randn(8, 6, requires_grad=True)
    z = Gaussian(size=3).build()(statistics, keys(8)).z
    z.sum().backward()
    assert statistics.grad is not None
    assert torch.allclose(statistics.grad[:, :3], torch.ones(8, 3))
    assert (statistics.grad[:, 3:] != 0).all()


@pytest.mark.parametrize("value", [-50.0, 50.0, 1e4, -1e4])
def test_extreme_statistics_stay_finite(value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        statistics = torch.full((2, 4), value, dtype=dtype, requires_grad=True)
        posterior = Gaussian(size=2).build()(statistics).posterior
        assert posterior.mu.dtype == torch.float32, "the loss must not be computed in bfloat16"
        assert posterior.logvar is not None
        assert posterior.logvar.abs().max() <= LOGVAR_BOUND
        total = gaussian_kl(posterior).sum()
        assert total.isfinite()
        total.backward()
        assert statistics.grad is not None
        assert statistics.grad.isfinite().all()


def test_small_log_variances_are_hardly_squashed() -> None:
    raw = torch.linspace(-3, 3, 101)
    statistics = torch.cat([torch.zeros_like(raw)[:, None], raw[:, None]], dim=1)
    logvar = Gaussian(size=1).build()(statistics).posterior.logvar
    assert logvar is not None
    assert (logvar[:, 0] - raw).abs().max() < 0.03


def test_deterministic_is_the_identity() -> None:
    statistics = torch.randn(3, 4)
    posterior = Deterministic(size=4).build()(statistics).posterior
    assert torch.equal(posterior.mu, statistics)
    assert posterior.logvar is None
