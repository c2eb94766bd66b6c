"""Gradient checkpointing saves memory and changes no bit, alone and under every strategy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.common.precision import autocast, parameter_dtype
from pipeline.losses.terms import gaussian_kl
from pipeline.models.autoencoder import AutoEncoder, ModelConfig, build_autoencoder, run_in_stages
from tests.activations import kept_bytes
from tests.distributed.test_zero import ZERO, config, two

__all__ = ["config", "two"]  # fixtures

BURGESS = {"kind": "burgess"}
DEEP = {"kind": "mlp", "hidden": [64] * 15}
CPU = torch.device("cpu")
BATCH = 4


class Case(NamedTuple):
    """A backbone, its event, and which part of its activations may be kept at most."""

    backbone: dict[str, Any]
    event_shape: tuple[int, ...]
    kept: float


def preset(name: str) -> dict[str, Any]:
    return {"kind": "resnet", "preset": name}


# A layer and its ReLU keep one map: of 15 hidden ones those that enter 5 stages are left. A
# residual block keeps four maps, of which its input is left.
CASES = [
    Case(BURGESS, (3, 64, 64), 0.25),
    Case(DEEP, (8, 8), 0.4),
    Case(preset("resnet-mini"), (3, 64, 64), 0.25),
    Case(preset("resnet-xs"), (3, 64, 64), 0.25),
]
each_case = pytest.mark.parametrize("case", CASES, ids=("burgess", "mlp", "mini", "xs"))


def build(case: Case, *, checkpointing: bool, precision: str = "fp32") -> AutoEncoder:
    model_config = ModelConfig.model_validate(
        {"backbone": case.backbone, "gradient_checkpointing": checkpointing}
    )
    return build_autoencoder(
        model_config, case.event_shape, seed=0, dtype=parameter_dtype(precision)
    )


def inputs(case: Case, precision: str = "fp32") -> Tensor:
    torch.manual_seed(1)
    return torch.rand(BATCH, *case.event_shape, dtype=parameter_dtype(precision))


def loss(model: nn.Module, x: Tensor, precision: str = "fp32") -> Tensor:
    """A VAE's loss, with everything that has a gradient."""
    with autocast(precision, CPU):
        output = model(x, keys=torch.arange(len(x)))
    likelihood = ModelConfig().likelihood
    nll = likelihood.nll(output.decoded, x, output.learned).sum()
    return nll + gaussian_kl(output.posterior).sum()


SMALL = Case(preset("resnet-mini"), (3, 16, 24), 0.5)
OTHERS = [(case, precision) for case in (*CASES[:2], SMALL) for precision in ("bf16", "fp64")]


@pytest.mark.parametrize(("case", "precision"), [*((c, "fp32") for c in CASES), *OTHERS])
def test_loss_and_gradients_are_the_same_bits(case: Case, precision: str):
    x = inputs(case, precision)
    found: list[tuple[Tensor, dict[str, Tensor | None]]] = []
    for checkpointing in (False, True):
        model = build(case, checkpointing=checkpointing, precision=precision)
        value = loss(model, x, precision)
        value.backward()
        found.append((value, {name: p.grad for name, p in model.named_parameters()}))
    (expected, expected_grads), (value, grads) = found
    assert torch.equal(value, expected)
    for name, gradient in expected_grads.items():
        assert gradient is not None, name
        assert gradient.any(), name
        assert torch.equal(grads[name], gradient), name


@each_case
def test_fewer_activations_are_kept(case: Case):
    x, keys = inputs(case), torch.arange(BATCH)

    def kept(checkpointing: bool) -> int:
        model = build(case, checkpointing=checkpointing)
        return kept_bytes(lambda: model(x, keys=keys), besides=(x, *model.parameters()))

    off, on = kept(False), kept(True)
    name = case.backbone.get("preset", case.backbone["kind"])
    mib = " or with checkpointing ".join(f"{kept / BATCH / 2**20:.3f}" for kept in (off, on))
    print(f"{name}: {mib} MiB of activations are kept of an image")
    assert 0 < on < case.kept * off


@each_case
def test_without_gradients_nothing_is_kept_and_nothing_differs(case: Case):
    x, keys = inputs(case), torch.arange(BATCH)
    expected = build(case, checkpointing=False)(x, keys=keys)
    model = build(case, checkpointing=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert kept_bytes(lambda: model(x, keys=keys)) == 0
            assert torch.equal(model(x, keys=keys).decoded, expected.decoded)
            assert torch.equal(model(x, mode="encode").posterior.mu, expected.posterior.mu)
            assert torch.equal(model(expected.z, mode="decode").decoded, expected.decoded)


def test_a_network_that_is_no_chain_is_one_stage():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x).relu()

    network, x = Residual(), torch.rand(2, 4)
    result = run_in_stages(network, x)
    result.sum().backward()
    gradient = network.inner.weight.grad
    network.zero_grad()
    network(x).sum().backward()
    assert torch.equal(result, network(x))
    assert torch.equal(gradient, network.inner.weight.grad)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
def test_it_compiles():
    case = SMALL
    x = inputs(case)
    model = build(case, checkpointing=True)
    expected = loss(model, x)
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    plain = build(case, checkpointing=False)
    names = list(model.state_dict())
    model.compile_networks()
    plain.compile_networks()
    assert list(model.state_dict()) == names
    keys = torch.arange(len(x))
    on, off = (kept_bytes(lambda m=m: m(x, keys=keys), m.parameters()) for m in (model, plain))
    found = loss(model, x)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is not None
        assert (parameter.grad - gradient).norm() < 1e-5 * gradient.norm()
    print(f"compiled: {off:,} bytes of activations are kept, or {on:,}")
    assert 0 < on < case.kept * off


STEPS = ("num_steps=3", "optimizer.learning_rate.warmup_samples=0", "accumulation=2")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp", marks=pytest.mark.distributed),
        *(pytest.param(s, marks=[pytest.mark.deepspeed, pytest.mark.soak]) for s in ZERO),
    ],
)
def test_two_processes_take_the_same_steps_bit_by_bit(two: Callable[..., Any], strategy: str):
    off, on = (
        two(strategy, *STEPS, f"model.gradient_checkpointing={value}")
        for value in ("false", "true")
    )
    for name in ("losses", "gradients", "norms", "parameters"):
        assert np.array_equal(on[name], off[name]), name
    assert np.abs(off["gradients"]).sum() > 0
    assert off["losses"][0] != off["losses"][-1]
