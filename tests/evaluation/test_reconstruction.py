"""Evaluation on a real stream, compared with brute force over the same images, one by one."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pipeline.common import rng
from pipeline.config import TrainConfig
from pipeline.corruptions import corrupt
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.reconstruction import Measurement, evaluating
from pipeline.evaluation.splits import held_out_splits
from pipeline.models.autoencoder import build_autoencoder
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.training.build import check_data, make_forward
from tests.export.world import damage_sample
from tests.shards import TINY_COUNTS, open_stream, tiny_image, write_tiny_shards

NOISE = ({"kind": "gaussian_noise", "sigma": [0.05, 0.3]},)
SIZE, D = 32, 3 * 32 * 32


@pytest.fixture(scope="module")
def runtime():
    return Runtime.start(accumulation=1)


@pytest.fixture(scope="module")
def index(tiny_shards):
    return Index.open(tiny_shards)


def config_of(tiny_shards, likelihood="gaussian", bottleneck="gaussian", **settings):
    link = {"link": "sigmoid"} if likelihood == "squared_error" else {}
    terms = [{"kind": "kl", "weight": 3.0}] if bottleneck == "gaussian" else []
    tree = {
        "run_dir": "unused",
        "data": {
            "path": str(tiny_shards),
            "decode": {"kind": "image", "size": SIZE, "channels": 3},
        },
        "model": {
            "backbone": {"kind": "mlp", "hidden": [16]},
            "bottleneck": {"kind": bottleneck, "size": 5},
            "likelihood": {"kind": likelihood, **link},
        },
        "objective": {"regularisers": terms},
        "corruptions": NOISE,
        "batch_size": 4,
    }
    return TrainConfig.model_validate(tree | settings)


def model_of(config, seed=0):
    shape = config.data.decode.event_shape
    model = build_autoencoder(config.model, shape, seed=seed, dtype=torch.float32)
    with torch.no_grad():  # wide enough that variances and noise matter
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def stream_of(config, index):
    return open_stream(
        config.data.model_copy(update={"split": "held_out"}),
        index=index,
        seed=config.seed,
        batch_size=config.batch_size,
        tail="mask",
    )


def evaluated(config, index, runtime, model=None):
    model = model or model_of(config)
    forward = make_forward(config, torch.device("cpu"))
    weights = config.objective.weights_at(0)
    measurement = Measurement(forward, config.evaluation.metrics, weights=weights)
    with stream_of(config, index) as stream, evaluating(model):
        for batch in stream:
            measurement.add(model, batch)
    return measurement.result(runtime)


def held_out(config, index):
    """Number and uid of every held-out sample: keys are their numbers."""
    numbers = {}
    with stream_of(config, index) as stream:
        for batch in stream:
            for key, uid, weight in zip(batch.keys, batch.uid, batch.weight, strict=True):
                if weight > 0:
                    assert int(key) not in numbers
                    numbers[int(key)] = int(uid)
    return numbers


@torch.no_grad()
def by_hand_of(config, model, number, uid):
    """The metrics of one image, from the picture in its shard."""
    x = torch.from_numpy(tiny_image(number)).permute(2, 0, 1).contiguous()[None].double() / 255
    one = torch.tensor([uid])
    corruption, noise = (
        rng.sample_keys(config.seed, f"evaluation/{use}", epoch=torch.zeros_like(one), uid=one)
        for use in ("corruption", "posterior")
    )
    seen = corrupt(x.float(), config.corruptions, corruption).x
    posterior = model(seen, mode="encode").posterior
    mu = posterior.mu.double()
    var = torch.zeros_like(mu) if posterior.logvar is None else posterior.logvar.double().exp()
    z = mu + var.sqrt() * rng.normal(noise, mu.shape[1:])
    likelihood = config.model.likelihood
    at_mean = likelihood.mean(model(mu.float(), mode="decode").decoded).double()
    at_sample = model(z.float(), mode="decode")
    return {
        "squared_error": ((x - at_mean) ** 2).sum().item(),
        "nll": likelihood.nll(at_sample.decoded, x.float(), at_sample.learned)
        .double()
        .sum()
        .item(),
        "kl": (0.5 * (mu**2 + var - 1 - var.log()).sum()).item(),
    }


def by_hand(config, index, model):
    """The means over the held-out images, one at a time."""
    rows = [by_hand_of(config, model, *sample) for sample in held_out(config, index).items()]
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


def test_every_held_out_sample_counts_once(tiny_shards, index, runtime):
    total = sum(TINY_COUNTS)
    count = sum(index.counts("held_out"))
    assert 0 < count < total
    config = config_of(tiny_shards)
    assert count % config.batch_size  # the last batch is filled with repeats
    assert evaluated(config, index, runtime)["samples"] == count
    assert len(held_out(config, index)) == count


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "squared_error"])
def test_a_random_bottleneck_equals_brute_force(tiny_shards, index, runtime, likelihood):
    config = config_of(tiny_shards, likelihood)
    found = evaluated(config, index, runtime)
    expected = by_hand(config, index, model_of(config))
    for name in ("squared_error", "kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["distortion"] == pytest.approx(expected["nll"], rel=1e-5)
    assert found["loss"] == pytest.approx(expected["nll"] + 3 * expected["kl"], rel=1e-5)
    nats = expected["nll"] + expected["kl"]
    if likelihood == "squared_error":
        assert "nats" not in found
    else:
        assert found["nats"] == pytest.approx(nats, rel=1e-5)
    if likelihood == "gaussian":
        bits = nats / math.log(2) / D + 8
        assert found["bits_per_dimension"] == pytest.approx(bits, rel=1e-5)
    else:
        assert "bits_per_dimension" not in found
    # The mean, not the noisy sample, gives the squared error.
    if likelihood == "squared_error":
        assert found["squared_error"] != pytest.approx(found["distortion"], rel=1e-4)


def test_a_deterministic_bottleneck_equals_brute_force(tiny_shards, index, runtime):
    config = config_of(tiny_shards, "squared_error", "deterministic")
    found = evaluated(config, index, runtime)
    expected = by_hand(config, index, model_of(config))["squared_error"]
    for name in ("squared_error", "loss", "distortion"):
        assert found[name] == pytest.approx(expected, rel=1e-5)
    assert found.keys() == {"squared_error", "loss", "distortion", "samples"}


def test_the_batch_size_and_the_order_do_not_matter(tiny_shards, index, runtime):
    one = evaluated(config_of(tiny_shards), index, runtime)
    count = int(one["samples"])
    for size, lanes in ((1, 1), (8, 2), (count, 1), (64, 64)):
        config = config_of(tiny_shards, batch_size=size)
        data = config.data.model_copy(update={"lanes": lanes})
        other = evaluated(config.model_copy(update={"data": data}), index, runtime)
        assert other == pytest.approx(one, rel=1e-5)


def test_two_evaluations_differ_by_the_weights_only(tiny_shards, index, runtime):
    config = config_of(tiny_shards)
    one, same = (evaluated(config, index, runtime) for _ in range(2))
    assert one == same
    assert evaluated(config, index, runtime, model_of(config, seed=1)) != one
    other_noise = config.model_copy(update={"seed": 1})
    assert evaluated(other_noise, index, runtime, model_of(config))["loss"] != one["loss"]


def test_the_model_comes_back_in_the_mode_it_had(tiny_shards, index, runtime):
    model = model_of(config_of(tiny_shards))
    for training in (True, False):
        model.train(training)
        evaluated(config_of(tiny_shards), index, runtime, model)
        assert model.training is training
        assert all(parameter.grad is None for parameter in model.parameters())


def test_bits_are_those_of_the_values_as_stored(tiny_shards, index, runtime):
    one, deep = (
        evaluated(config_of(tiny_shards, data=data), index, runtime)
        for dtype in ("uint8", "uint16")
        for data in [
            {"path": str(tiny_shards), "decode": {"kind": "image", "size": SIZE, "dtype": dtype}}
        ]
    )
    bits = one["bits_per_dimension"] + 8
    assert deep == {**one, "bits_per_dimension": pytest.approx(bits)}  # 257 v / 65535 = v / 255


def test_a_broken_sample_is_counted_listed_and_left_out(tmp_path, runtime):
    shards = tmp_path / "shards"
    write_tiny_shards(shards)
    index = build_index(shards, split=SplitSpec(fractions={"train": 0.75, "held_out": 0.25}))
    config = config_of(shards)
    whole = by_hand(config, index, model_of(config))["squared_error"]
    numbers = held_out(config, index)
    in_second_shard = range(TINY_COUNTS[0], TINY_COUNTS[0] + TINY_COUNTS[1])
    broken = next(number for number in numbers if number in in_second_shard)
    alone = by_hand_of(config, model_of(config), broken, numbers[broken])["squared_error"]
    key = damage_sample(shards, "tiny-0001.tar", broken - TINY_COUNTS[0])
    assert int(key) == broken
    held_out_of_run = HeldOut(
        config,
        held_out_splits(config, [index], check_data(config, [index])),
        make_forward(config, torch.device("cpu")),
        runtime,
        Quarantine(tmp_path, config.data, runtime),
    )
    found = held_out_of_run.evaluate({"eval": lambda: nullcontext(model_of(config))}, step=0)
    metrics = {name.removeprefix("eval/"): value for name, value in found.items()}
    count = len(numbers)
    assert (metrics["tombstones"], metrics["samples"]) == (1, count - 1)
    expected = (whole * count - alone) / (count - 1)
    assert metrics["squared_error"] == pytest.approx(expected, rel=1e-5)
    [entry] = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert (json.loads(entry)["key"], json.loads(entry)["uid"]) == (key, numbers[broken])
