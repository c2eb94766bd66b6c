"""Backbones, bottlenecks and the autoencoder: shapes, parameter counts, gradients, determinism."""

import math
from typing import Any, get_args

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.losses.terms import gaussian_kl
from pipeline.models.autoencoder import ModelConfig, build_autoencoder, num_parameters
from pipeline.models.backbones import Backbone, BackboneBase, Burgess, Locatello, Mlp, Tiny
from pipeline.models.bottlenecks import LOGVAR_BOUND, Deterministic, Gaussian, Posterior

BACKBONES: tuple[type[BackboneBase], ...] = get_args(get_args(Backbone)[0])
# The settings of each kind, and the events that it is built for.
SMALL = {"widths": [8, 16], "blocks": 1, "groups": 4, "attention": {"levels": [1]}}
SQUARES = ((1, 64, 64), (3, 64, 64), (3, 32, 32))
CASES: dict[str, tuple[dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "burgess": ({}, SQUARES),
    "locatello": ({}, SQUARES[:2]),
    "mlp": ({}, (*SQUARES, (2, 3))),
    "resnet": (SMALL, ((1, 16, 16), (3, 16, 24), (4, 24, 16))),
    "tiny": ({}, ((1, 16, 8), (4, 8, 16))),
}
EVENTS = [
    pytest.param({"kind": kind, **settings}, shape, id=f"{kind}-{'x'.join(map(str, shape))}")
    for kind, (settings, shapes) in CASES.items()
    for shape in shapes
]


def build(event_shape: tuple[int, ...], **config: Any) -> Any:
    model_config = ModelConfig.model_validate(config)
    return build_autoencoder(model_config, event_shape, seed=0, dtype=torch.float32)


def keys(num: int) -> Tensor:
    return torch.arange(num) * 7919


def test_every_backbone_has_a_case() -> None:
    assert {kind.model_fields["kind"].default for kind in BACKBONES} == set(CASES)


@pytest.mark.parametrize(("backbone", "event_shape"), EVENTS)
@pytest.mark.parametrize("bottleneck", ["deterministic", "gaussian"])
@pytest.mark.parametrize("likelihood", ["squared_error", "gaussian", "bernoulli"])
def test_contract(
    backbone: dict[str, Any], bottleneck: str, likelihood: str, event_shape: tuple[int, ...]
) -> None:
    model = build(
        event_shape,
        backbone=backbone,
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
@pytest.mark.parametrize("kind", ["mlp", "burgess", "resnet", "tiny"])
def test_latents_become_pictures(kind: str, likelihood: str) -> None:
    model = build(
        (3, 32, 32), backbone={"kind": kind, **CASES[kind][0]}, likelihood={"kind": likelihood}
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


def test_locatello_has_the_published_number_of_parameters_and_initial_weights() -> None:
    for channels, expected in ((1, 690_517), (3, 692_567)):
        backbone, likelihood = {"kind": "locatello"}, {"kind": "bernoulli"}
        model = build((channels, 64, 64), backbone=backbone, likelihood=likelihood)
        assert num_parameters(model) == expected
        assert num_parameters(model.encoder) == 309_204 + 1024 * (channels == 3)
    # Glorot: uniform within sqrt(6 / (fan_in + fan_out)).
    for layer, fans in ((model.encoder[2], 32 * 16 + 32 * 16), (model.decoder[2], 256 + 1024)):
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 64, 96), (3,)])
def test_locatello_refuses_other_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"locatello takes .* 64, 64\], not .* data.decode.size"):
        Locatello().check_event(shape)


@pytest.mark.parametrize(
    ("channels", "encoder", "decoder"),
    [(4, 1_222_532, 1_222_531), (16, 1_229_456, 1_229_443)],
)
def test_tiny_is_diffusers_autoencoder_tiny(channels: int, encoder: int, decoder: int) -> None:
    """Pixels are [0, 1] here, and [-1, 1] there."""
    bottleneck, likelihood = {"kind": "deterministic", "size": channels}, {"kind": "squared_error"}
    model = build(
        (3, 64, 40), backbone={"kind": "tiny"}, bottleneck=bottleneck, likelihood=likelihood
    )
    assert num_parameters(model.encoder) == encoder
    assert num_parameters(model.decoder) == decoder
    other: Any = AutoencoderTiny(latent_channels=channels)
    model.load_state_dict(other.state_dict())
    for side in (40, 64):
        x = torch.rand(2, 3, 64, side)
        with torch.no_grad():
            latents = other.encode(2 * x - 1).latents
            torch.testing.assert_close(model(x).z, latents, rtol=0, atol=1e-5)
            far = 40 * latents  # where the decoder bends them
            pictures = (other.decode(far).sample + 1) / 2
            found = model(far, mode="decode").decoded
        torch.testing.assert_close(found, pictures, rtol=0, atol=1e-5)


def test_tiny_refuses_sides_that_8_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"36 pixels .* multiple of 8.* \[64, 32\] or \[64, 40\]"):
        Tiny().check_event((3, 64, 36))
    with pytest.raises(ValueError, match="tiny takes pictures"):
        Tiny().check_event((100,))


@pytest.mark.parametrize("kind", CASES)
def test_weights_depend_on_the_seed_alone(kind: str) -> None:
    settings, shapes = CASES[kind]
    config = ModelConfig.model_validate({"backbone": {"kind": kind, **settings}})
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = build_autoencoder(config, shapes[0], seed=3, dtype=torch.float32).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    b = build_autoencoder(config, shapes[0], seed=3, dtype=torch.float32).state_dict()
    c = build_autoencoder(config, shapes[0], seed=4, dtype=torch.float32).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [n for n in a if a[n].ndim > 1] == [
        n for n in a if a[n].ndim > 1 and not torch.equal(a[n], c[n])
    ]


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
