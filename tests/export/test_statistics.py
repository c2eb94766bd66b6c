"""Exact statistics, compared with numpy in float64; the same bits for any division of rows."""

import itertools
import json
import math
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


def brute_force(latents: dict, valid: np.ndarray) -> dict:
    """All statistics from all values at once, each sum correctly rounded."""
    mu, sigma2 = flat(latents["mu"][valid]), np.vectorize(math.exp)(flat(latents["logvar"][valid]))
    count, channels = mu.shape

    def mean_of(values: np.ndarray) -> float:
        return math.fsum(values.ravel()) / values.size

    mean = np.array([mean_of(mu[:, i]) for i in range(channels)])
    centred = mu - mean
    pairs = range(channels)
    covariance = np.array([[mean_of(centred[:, i] * centred[:, j]) for j in pairs] for i in pairs])
    sigma2_mean = np.array([mean_of(sigma2[:, i]) for i in pairs])
    overall = mean_of(mu)
    return {
        "count": count,
        "mean": mean,
        "covariance": covariance,
        "sigma2": sigma2_mean,
        "latents_std": np.sqrt(np.diag(covariance) + sigma2_mean),
        "global": (overall, math.sqrt(mean_of((mu - overall) ** 2))),
        "scale": 1 / math.sqrt(mean_of((mu - overall) ** 2) + mean_of(sigma2)),
        "active": int((np.diag(covariance) > 0.01).sum()),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(10,), (4, 3, 5)])
def test_equal_the_brute_force_over_all_values_to_1e_12(shape: tuple[int, ...], dtype: str):
    latents, valid = make(shape, dtype=dtype, offset=2.0)
    latents["mu"][:, 1] = 2 + latents["mu"][:, 1] / 100  # a channel that is not active
    expected = brute_force(latents, valid)
    found = merge(cut(latents, valid, [0, 1, 100, 100, 300]))
    close = {"rtol": 1e-12, "atol": 0}
    np.testing.assert_allclose(found["latents_mean"], expected["mean"], **close)
    np.testing.assert_allclose(found["latents_std"], expected["latents_std"], **close)
    np.testing.assert_allclose(found["sigma2_mean"]["channel"], expected["sigma2"], **close)
    stds = np.sqrt(np.diag(expected["covariance"]))
    np.testing.assert_allclose(found["mu"]["std"], stds, **close)
    difference = np.abs(np.array(found["mu"]["covariance"]) - expected["covariance"])
    assert (difference <= 1e-12 * np.outer(stds, stds)).all()
    overall = found["mu"]["global"]
    np.testing.assert_allclose((overall["mean"], overall["std"]), expected["global"], **close)
    np.testing.assert_allclose(found["scaling_factor"], expected["scale"], **close)
    assert found["num_values_per_channel"] == expected["count"]
    assert found["active_units"] == {"count": expected["active"], "min_variance": 0.01}
    assert 0 < expected["active"] < shape[0]


def test_samples_are_told_by_their_name():
    latents, valid = make((4,))
    as_samples = merge([partial_of({"z": latents["mu"]}, valid)])
    as_means = merge([partial_of({"mu": latents["mu"]}, valid)])
    assert as_samples["z"] == as_means["mu"]
    assert "mu" not in as_samples
    assert as_samples["active_units"] is None  # the variance of z is not that of its mean
    assert as_samples["latents_std"] == as_samples["z"]["std"]


def test_mirrored_views_do_not_count():
    latents, valid = make((4,))
    twice = latents | {f"{name}_hflip": 2 * values for name, values in latents.items()}
    assert merge([partial_of(twice, valid)]) == merge([partial_of(latents, valid)])


def test_rows_that_are_not_finite_are_counted():
    latents, valid = make((4,))
    faults = [[3, "a", "latent", "not a finite float16 number"], [5, "b", "decode", "broken"]]
    parts = [partial_of(latents, valid, faults), partial_of(latents, valid, faults[1:])]
    assert merge(parts)["num_rows_not_finite"] == 1


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
    faults = [[row, str(row), "latent", "inf"] for row in range(len(valid))]
    nothing = partial_of(latents, np.zeros_like(valid), faults)
    assert merge([nothing]) == {"num_rows": 0, "num_rows_not_finite": 300}
    assert merge([]) == {"num_rows": 0, "num_rows_not_finite": 0}
    other = partial_of(latents, valid)
    assert merge([nothing, other]) == merge([other]) | {"num_rows_not_finite": 300}


def test_constant_latents_have_no_scaling_factor():
    found = merge([partial_of({"mu": np.ones((5, 2), np.float32)}, np.ones(5, bool))])
    assert found["scaling_factor"] is None
    assert found["mu"]["std"] == [0.0, 0.0]


def test_text_is_json():
    latents, valid = make((3,))
    found = merge([partial_of(latents, valid)])
    assert json.loads(to_text(found)) == found
