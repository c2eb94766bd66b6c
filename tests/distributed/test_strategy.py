"""What a strategy promises, on one process: updates, skipped updates, averages, its state."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.distributed.optimizer import AdamWConfig
from pipeline.distributed.strategies.base import FullState
from pipeline.distributed.strategies.ddp import DdpStrategy
from pipeline.models.autoencoder import AutoEncoder, ModelConfig, build_autoencoder, tensors_sha256
from pipeline.models.backbones import Burgess

SHAPE = (1, 32, 32)
RATE = 1e-3


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="module")
def initial() -> AutoEncoder:
    """A convolutional model; never trained itself."""
    return build_autoencoder(ModelConfig(backbone=Burgess()), SHAPE, seed=0, dtype=torch.float32)


@pytest.fixture
def make(accelerator: Accelerator, initial: AutoEncoder):
    """Wrap a fresh copy of the initial model."""

    def make(*, ema_decay: float | None = 0.999, **optimizer) -> DdpStrategy:
        model = copy.deepcopy(initial).to(memory_format=torch.channels_last)
        config = AdamWConfig(**optimizer)
        strategy = DdpStrategy(
            model, optimizer=config, ema_decay=ema_decay, accelerator=accelerator
        )
        strategy.set_learning_rates({"autoencoder": RATE})
        return strategy

    return make


def loss_of(model, seed: int, *, scale: float = 1.0) -> Tensor:
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(seed))
    output = model(x)
    learned = sum((value**2).sum() for value in output.learned.values())
    return scale * ((output.decoded - x) ** 2).sum() / 2 + learned + output.posterior.logvar.sum()


def update(strategy: DdpStrategy, seed: int, *, scale: float = 1.0):
    with strategy.accumulate(is_last=True):
        strategy.backward(loss_of(strategy.model, seed, scale=scale))
    return strategy.step()


def digests(state: FullState) -> dict[str, str | int | None]:
    parts = {name: getattr(state, name) for name in ("model", "ema", "exp_avg", "exp_avg_sq")}
    hashed = {name: value and tensors_sha256(value) for name, value in parts.items()}
    return hashed | {"num_updates": state.num_updates}


def parameters(strategy: DdpStrategy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in strategy.model.named_parameters()}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_updates_and_moments_are_those_of_plain_adamw(make, initial, max_grad_norm):
    """The same fused kernel, so to the last bit; with torch's own clipping beside ours."""
    options = {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6, "weight_decay": 0.1}
    strategy = make(max_grad_norm=max_grad_norm, **options)
    plain = copy.deepcopy(initial).to(memory_format=torch.channels_last)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.8, 0.99), eps=1e-6, fused=True)
    for seed in range(4):
        result = update(strategy, seed)
        loss_of(plain, seed).backward()
        limit = max_grad_norm if max_grad_norm is not None else torch.inf
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit)
        assert torch.equal(result.grad_norm, norm)
        assert norm > 0.5
        assert result.applied == 1
        adamw.step()
        adamw.zero_grad()
    state = strategy.full_state()
    assert state.num_updates == 4
    assert tensors_sha256(state.model) == tensors_sha256(plain.state_dict())
    for kind in ("exp_avg", "exp_avg_sq"):
        expected = {name: adamw.state[p][kind] for name, p in plain.named_parameters()}
        assert tensors_sha256(getattr(state, kind)) == tensors_sha256(expected)


def test_clipping_is_by_the_norm_over_all_parameters(make):
    """After one step from zero moments, exp_avg = (1 - beta1) * clipped gradient."""
    strategy = make(max_grad_norm=0.25)
    norm = update(strategy, 0).grad_norm
    moments = strategy.full_state().exp_avg.values()
    clipped = torch.cat([m.flatten() for m in moments]).norm() / (1 - 0.9)
    assert norm > 1
    assert clipped.item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("scale", "updates_before", "max_grad_norm"),
    [(float("nan"), 0, None), (float("nan"), 2, 1.0), (float("inf"), 2, None), (1e38, 2, 1.0)],
)
def test_a_gradient_that_is_not_finite_moves_nothing(make, scale, updates_before, max_grad_norm):
    """No parameter, moment, average or count; and the run goes on as if it had not been there."""
    spared, struck = make(max_grad_norm=max_grad_norm), make(max_grad_norm=max_grad_norm)
    for strategy in (spared, struck):
        for seed in range(updates_before):
            update(strategy, seed)
    before = digests(struck.full_state()), parameters(struck)
    result = update(struck, 9, scale=scale)
    assert result.applied == 0
    assert not result.grad_norm.isfinite()
    assert struck.full_state().num_updates == updates_before
    after = digests(struck.full_state()), parameters(struck)
    assert (after[0]["model"], after[0]["ema"]) == (before[0]["model"], before[0]["ema"])
    if updates_before:
        assert after[0] == before[0]
    else:
        assert not any(m.any() for m in struck.full_state().exp_avg.values())
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())

    for strategy in (spared, struck):
        assert update(strategy, 10).applied == 1
    assert digests(struck.full_state()) == digests(spared.full_state())


def test_the_average_follows_its_formula(make):
    """ema += (1 - d) * (p - ema) with d = min(decay, (1 + u) / (10 + u)), here in float64."""
    strategy = make(ema_decay=0.3)
    expected = {name: p.double() for name, p in parameters(strategy).items()}
    decays = []
    for seed in range(6):
        update(strategy, seed)
        u = seed + 1
        decays.append(min(0.3, (1 + u) / (10 + u)))
        for name, p in parameters(strategy).items():
            expected[name] += (1 - decays[-1]) * (p.double() - expected[name])
    assert decays[0] < 0.3  # the ramp
    assert decays[-1] == 0.3  # and after it
    ema = strategy.full_state().ema
    assert ema is not None
    assert not all(torch.equal(ema[name], p) for name, p in parameters(strategy).items())
    for name, value in expected.items():
        torch.testing.assert_close(ema[name].double(), value, rtol=0, atol=1e-6)


def test_averaged_swaps_parameters_and_averages_and_back(make):
    strategy = make(ema_decay=0.9)
    for seed in range(3):
        update(strategy, seed)
    before = strategy.full_state()
    assert before.ema is not None

    def evaluate_and_fail():
        with strategy.averaged():
            assert tensors_sha256(parameters(strategy)) == tensors_sha256(before.ema)
            raise KeyError

    with pytest.raises(KeyError):
        evaluate_and_fail()
    assert digests(strategy.full_state()) == digests(before)
    other = make(ema_decay=0.9)
    for seed in range(3):
        update(other, seed)
    for one in (strategy, other):
        update(one, 3)
    assert digests(strategy.full_state()) == digests(other.full_state())


def test_a_loaded_state_is_the_saved_one_and_goes_on_like_it(make):
    trained, fresh = make(), make()
    for seed in range(3):
        update(trained, seed)
    saved = trained.full_state()
    fresh.load_full_state(saved)
    assert digests(fresh.full_state()) == digests(saved)
    for strategy in (trained, fresh):
        strategy.set_learning_rates({"autoencoder": 0.5 * RATE})
        update(strategy, 3)
    assert digests(fresh.full_state()) == digests(trained.full_state())
    assert digests(fresh.full_state()) != digests(saved)


def test_a_saved_state_does_not_change_with_the_model(make):
    strategy = make()
    update(strategy, 0)
    saved = strategy.full_state()
    before = digests(saved)
    update(strategy, 1)
    assert digests(saved) == before


def test_an_initial_state_undoes_training(make):
    """Also the moments, of which an initial state has none."""
    trained, fresh = make(), make()
    initial_state = fresh.full_state()
    assert initial_state.exp_avg == {}
    for seed in range(3):
        update(trained, seed)
    trained.load_full_state(initial_state)
    for strategy in (trained, fresh):
        update(strategy, 7)
    assert digests(trained.full_state()) == digests(fresh.full_state())


def test_the_throw_away_step_leaves_no_trace(make):
    warmed, fresh = make(), make()
    warmed.warm_up(loss_of(warmed.model, 5) * 0.0)
    assert digests(warmed.full_state()) == digests(fresh.full_state())
    assert all(p.grad is None for p in warmed.model.parameters())
    for strategy in (warmed, fresh):
        update(strategy, 0)
    assert digests(warmed.full_state()) == digests(fresh.full_state())


def test_an_average_may_be_turned_on_late_or_off(make):
    with_average, without = make(), make(ema_decay=None)
    update(without, 0)
    assert without.full_state().ema is None
    with_average.load_full_state(without.full_state())
    state = with_average.full_state()
    assert state.ema is not None
    names = list(parameters(with_average))
    assert all(torch.equal(state.ema[name], state.model[name]) for name in names)
    without.load_full_state(state)
    assert without.full_state().ema is None


def test_the_memory_of_a_former_state_serves_the_next(make):
    strategy = make()
    update(strategy, 0)
    former = strategy.full_state()
    places = [value.data_ptr() for value in former.model.values()]
    expected = digests(former)
    update(strategy, 1)
    assert digests(former) == expected
    again = strategy.full_state(into=former)
    assert [value.data_ptr() for value in again.model.values()] == places
    assert digests(again) == digests(strategy.full_state()) != expected


def test_who_does_not_want_the_state_gets_the_count_only(make):
    strategy = make()
    update(strategy, 0)
    state = strategy.full_state(wanted=False)
    assert (state.model, state.ema, state.exp_avg, state.exp_avg_sq) == ({}, None, {}, {})
    assert state.num_updates == 1
