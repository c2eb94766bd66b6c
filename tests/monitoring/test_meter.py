"""Logged means, compared with numpy's, on one process and two; counts of a training."""

import math

import numpy as np
import pytest
import torch

from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import StepResult
from pipeline.losses.objective import Losses
from pipeline.monitoring.meter import Meter, TrainingMeter
from tests.shards import open_stream

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runtime():
    return Runtime.start(accumulation=1)


def values_and_weights(seed, size):
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(size, generator=generator) * 1e3 for name in ("a", "b")}
    return values, torch.randint(0, 2, (size,), generator=generator).float()


def test_means_are_numpys_weighted_means_whatever_the_batches(runtime):
    values, weight = values_and_weights(0, 1000)
    weight = weight * torch.rand(1000, generator=torch.Generator().manual_seed(1))
    for size in (1, 7, 1000):
        meter = Meter(CPU)
        for start in range(0, 1000, size):
            part = slice(start, start + size)
            meter.add({name: value[part] for name, value in values.items()}, weight[part])
        means, total = meter.reduce(runtime)
        assert total == pytest.approx(weight.double().sum().item(), rel=1e-12)
        for name, value in values.items():
            expected = np.average(value.double(), weights=weight.double())
            assert means[name] == pytest.approx(expected, rel=1e-5)


def test_reduce_starts_anew(runtime):
    meter = Meter(CPU)
    meter.add({"a": torch.tensor([1.0, 2.0])}, torch.ones(2))
    assert meter.reduce(runtime) == ({"a": 1.5}, 2.0)
    meter.add({"b": torch.tensor([5.0])}, torch.ones(1))
    assert meter.reduce(runtime) == ({"b": 5.0}, 1.0)
    assert meter.reduce(runtime) == ({}, 0.0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
def test_a_tombstone_may_hold_anything(runtime, bad):
    meter = Meter(CPU)
    meter.add({"a": torch.tensor([bad, 2.0, 4.0])}, torch.tensor([0.0, 1.0, 1.0]))
    meter.add({"a": torch.tensor([bad])}, torch.tensor([0.0]))
    assert meter.reduce(runtime) == ({"a": 3.0}, 2.0)


def test_a_broken_value_that_counts_is_seen(runtime):
    meter = Meter(CPU)
    meter.add({"a": torch.tensor([math.nan, 2.0])}, torch.ones(2))
    assert math.isnan(meter.reduce(runtime)[0]["a"])


def test_the_mean_of_tombstones_alone_is_nan(runtime):
    meter = Meter(CPU)
    meter.add({"a": torch.ones(3)}, torch.zeros(3))
    means, weight = meter.reduce(runtime)
    assert weight == 0
    assert math.isnan(means["a"])


def test_long_sums_do_not_drift(runtime):
    meter = Meter(CPU)
    for _ in range(3000):
        meter.add({"a": torch.full((100,), 0.1) + 1000}, torch.ones(100))
    assert meter.reduce(runtime)[0]["a"] == pytest.approx(float(np.float32(1000.1)), rel=1e-9)


def step_result(norm):
    return StepResult(torch.tensor(norm), None, torch.tensor(float(math.isfinite(norm))))


@pytest.fixture
def stream(tiny_shards):
    decode = {"kind": "image", "size": 32, "channels": 3}
    data = DataConfig.model_validate({"path": str(tiny_shards), "decode": decode})
    with open_stream(data, index=Index.open(tiny_shards), seed=0, batch_size=4) as stream:
        yield stream


def test_a_training_meter_reports_steps_speed_and_stalls(runtime, stream):
    meter = TrainingMeter(runtime, stream)
    generator = torch.Generator().manual_seed(2)
    a, b, c, d = torch.rand(4, 8, generator=generator)
    for part in (slice(0, 4), slice(4, 8)):
        losses = Losses(a[part], b[part], b[part], {"kl": c[part]}, d[part])
        meter.add(losses, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    for norm in (3.0, math.inf, math.nan, 5.0):
        meter.add_step(step_result(norm))
    stream.counters.stall_seconds += 1e-9
    values = meter.read()
    counted = [0, 1, 2, 4, 5, 6]
    for name, value in (("loss", a), ("distortion", b), ("kl", c), ("squared_error", d)):
        assert values[f"train/{name}"] == pytest.approx(value[counted].mean().item(), rel=1e-6)
    assert values["optim/grad_norm"] == 4.0  # of the applied steps
    assert values["optim/skipped_steps"] == 2
    seconds = 6 / values["perf/images_per_second"]
    assert 0 < seconds < 5
    assert values["perf/data_wait_fraction"] == pytest.approx(1e-9 / seconds, rel=1e-6)

    meter.add_step(step_result(math.nan))
    values = meter.read()
    assert math.isnan(values["optim/grad_norm"])  # no step was applied
    assert values["optim/skipped_steps"] == 3  # since the start
    assert not any(name.startswith("train/") for name in values)
    assert values["perf/images_per_second"] == values["perf/data_wait_fraction"] == 0
    meter.add_step(step_result(2.0))
    assert meter.read()["optim/grad_norm"] == 2.0


TWO_RANKS = """
import torch
from pipeline.common.leaving import leave
from pipeline.monitoring.meter import Meter
from pipeline.distributed.runtime import Runtime
from tests.monitoring.test_meter import values_and_weights

runtime = Runtime.start(accumulation=1)
meter = Meter(runtime.device)
values, weight = values_and_weights(runtime.rank, 40 + 20 * runtime.rank)
meter.add(values, weight)
means, total = meter.reduce(runtime)
if runtime.is_main:
    print("MEANS", means["a"], means["b"], total)
leave(0)
"""


@pytest.mark.distributed
def test_means_are_over_all_ranks_by_weight_not_by_rank(tmp_path, run_processes):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    ended = run_processes(script, 2)
    assert ended.code == 0, ended.output
    [line] = [line for line in ended.output.splitlines() if line.startswith("MEANS")]
    ranks = [values_and_weights(rank, 40 + 20 * rank) for rank in (0, 1)]
    weight = torch.cat([weight for _, weight in ranks])
    expected = [np.average(torch.cat([v[n] for v, _ in ranks]), weights=weight) for n in "ab"]
    assert [float(x) for x in line.split()[1:]] == pytest.approx([*expected, float(weight.sum())])
