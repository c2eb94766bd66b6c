"""Exact statistics against numpy in float64, and the same bits for every division of the rows."""

import itertools
import json
import random

import numpy as np
import pytest

from pipeline.export.statistics import (
    MAX_COVARIANCE_CHANNELS,
    Partial,
    merge,
    partial_of,
    to_json,
    to_text,
)

SHAPES = [(10,), (4, 3, 5), (1,), (MAX_COVARIANCE_CHANNELS + 1,)]


def make(shape: tuple[int, ...], *, rows: int = 300, dtype: str = "float32", offset: float = 5.0):
    generator = np.random.default_rng(0)
    latents = {
        "mu": (generator.normal(size=(rows, *shape)) * 3 + offset).astype(dtype),
        "logvar": generator.normal(size=(rows, *shape)).astype(dtype),
    }
    return latents, generator.random(rows) > 0.1


def cut(latents: dict, valid: np.ndarray, bounds: list[int]) -> list[Partial]:
    return [
        partial_of({name: values[lo:hi] for name, values in latents.items()}, valid[lo:hi])
        for lo, hi in itertools.pairwise(bounds)
    ]


def flat(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values.astype(np.float64), 1, -1).reshape(-1, values.shape[1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_numpy(shape: tuple[int, ...], dtype: str):
    latents, valid = make(shape, dtype=dtype)
    found = merge(cut(latents, valid, [0, 1, 100, 100, 300]))
    mu, sigma2 = flat(latents["mu"][valid]), np.exp(flat(latents["logvar"][valid]))
    close = {"rtol": 1e-12}
    assert found["num_rows"] == valid.sum()
    assert found["num_values_per_channel"] == len(mu)
    np.testing.assert_allclose(found["mu"]["mean"], mu.mean(axis=0), **close)
    np.testing.assert_allclose(found["mu"]["std"], mu.std(axis=0), **close)
    np.testing.assert_array_equal(found["mu"]["min"], mu.min(axis=0))
    np.testing.assert_array_equal(found["mu"]["max"], mu.max(axis=0))
    np.testing.assert_allclose(found["sigma2_mean"]["channel"], sigma2.mean(axis=0), **close)
    np.testing.assert_allclose(found["sigma2_mean"]["global"], sigma2.mean(), **close)
    overall = found["mu"]["global"]
    np.testing.assert_allclose(overall["mean"], mu.mean(), **close)
    np.testing.assert_allclose(overall["std"], mu.std(), **close)
    assert (overall["min"], overall["max"]) == (mu.min(), mu.max())
    if shape[0] <= MAX_COVARIANCE_CHANNELS:
        expected = np.atleast_2d(np.cov(mu.T, bias=True))
        np.testing.assert_allclose(found["mu"]["covariance"], expected, atol=1e-10)
    else:
        assert found["mu"]["covariance"] is None


def test_diffusers_names_normalise_sampled_latents():
    """(z - shift_factor) * scaling_factor has mean 0 and variance 1 over z = mu + sigma eps."""
    latents, valid = make((4,), rows=20_000)
    found = merge([partial_of(latents, valid)])
    noise = np.random.default_rng(1).normal(size=latents["mu"].shape)
    z = (latents["mu"] + np.exp(0.5 * latents["logvar"]) * noise)[valid]
    overall = (z - found["shift_factor"]) * found["scaling_factor"]
    np.testing.assert_allclose([overall.mean(), overall.std()], [0, 1], atol=0.01)
    each = (z - found["latents_mean"]) / found["latents_std"]
    np.testing.assert_allclose(each.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(each.std(axis=0), 1, atol=0.03)


def test_without_logvar_the_mean_alone_counts():
    latents, valid = make((4,))
    del latents["logvar"]
    found = merge([partial_of(latents, valid)])
    assert found["sigma2_mean"] is None
    assert found["latents_std"] == found["mu"]["std"]
    assert found["scaling_factor"] == 1 / found["mu"]["global"]["std"]


def test_order_of_tasks_does_not_matter():
    latents, valid = make((6,))
    partials = cut(latents, valid, list(range(0, 301, 10)))
    expected = to_text(merge(partials))
    for seed in range(10):
        shuffled = random.Random(seed).sample(partials, len(partials))
        assert to_text(merge(shuffled)) == expected
    naive = {
        sum(random.Random(s).sample([p.sigma2_total[0] for p in partials], 30)) for s in range(10)
    }
    assert len(naive) > 1  # what the plain sum would have given


def test_partials_survive_json():
    latents, valid = make((6, 2))
    partials = cut(latents, valid, [0, 150, 300])
    stored = [Partial(**json.loads(json.dumps(to_json(partial)))) for partial in partials]
    assert stored == partials


def test_large_mean_does_not_swallow_the_variance():
    latents, valid = make((3,), offset=1e6, dtype="float64")
    found = merge(cut(latents, valid, [0, 100, 300]))
    expected = latents["mu"][valid].astype(np.float64).std(axis=0)
    np.testing.assert_allclose(found["mu"]["std"], expected, rtol=1e-9)


def test_invalid_rows_do_not_count():
    latents, valid = make((3,))
    expected = merge([partial_of(latents, valid)])
    latents["mu"][~valid] = np.nan
    latents["logvar"][~valid] = np.inf
    assert merge([partial_of(latents, valid)]) == expected


def test_no_valid_rows_at_all():
    latents, valid = make((3,))
    assert merge([partial_of(latents, np.zeros_like(valid))]) == {"num_rows": 0}
    assert merge([]) == {"num_rows": 0}


def test_constant_latents_have_no_scaling_factor():
    found = merge([partial_of({"mu": np.ones((5, 2), np.float32)}, np.ones(5, bool))])
    assert found["scaling_factor"] is None
    assert found["mu"]["std"] == [0.0, 0.0]


def test_text_is_json():
    latents, valid = make((3,))
    found = merge([partial_of(latents, valid)])
    assert json.loads(to_text(found)) == found
