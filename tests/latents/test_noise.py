"""The numpy twin of `pipeline.common.rng`: the same bits, and normals to about an ulp."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy._core._multiarray_umath import __cpu_dispatch__

from pipeline.common import rng
from pipeline.latents import noise
from tests.processes import ROOT

UIDS = np.array([0, 1, 7, 2**40 + 3, 2**62], np.int64)


def keys_of(seed: int, epoch: int) -> tuple[np.ndarray, torch.Tensor]:
    theirs = rng.sample_keys(
        seed, "latents", epoch=torch.full((len(UIDS),), epoch), uid=torch.from_numpy(UIDS)
    )
    return noise.sample_keys(seed, "latents", epoch=epoch, uid=UIDS), theirs


@pytest.mark.parametrize("seed, epoch", [(0, 0), (0, 1), (12345, 9)])
def test_keys_and_uniforms_have_the_same_bits(seed: int, epoch: int):
    ours, theirs = keys_of(seed, epoch)
    np.testing.assert_array_equal(ours.view(np.int64), theirs.numpy())
    for shape in ((), (1,), (7,), (4, 5, 3)):
        found, expected = noise.uniform(ours, shape), rng.uniform(theirs, shape).numpy()
        assert found.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(1,), (7,), (4, 32, 32)])
def test_normals_agree(shape: tuple[int, ...]):
    ours, theirs = keys_of(3, 4)
    found, expected = noise.normal(ours, shape), rng.normal(theirs, shape).numpy()
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


def test_a_sample_is_the_mean_and_the_keyed_noise_times_sigma():
    mu, logvar = np.random.default_rng(0).normal(size=(2, len(UIDS), 4, 3)).astype(np.float32)
    found = noise.sample(mu, logvar, UIDS, seed=3)
    eps = rng.normal(keys_of(3, 0)[1], (4, 3)).numpy()
    np.testing.assert_allclose(found, mu + np.exp(0.5 * logvar) * eps, rtol=0, atol=3e-5)
    one = noise.sample(mu[2:3], logvar[2:3], UIDS[2:3], seed=3)
    np.testing.assert_array_equal(one, found[2:3])
    others = ({"seed": 4}, {"seed": 3, "epoch": 1}, {"seed": 3, "view": "hflip"})
    assert all((noise.sample(mu, logvar, UIDS, **other) != found).all() for other in others)


SCRIPT = """
import hashlib
import numpy as np
from pipeline.latents import noise

rows = np.arange(1000)
mu = (rows[:, None] * np.arange(1, 65) % 17 - 8).astype(np.float32) / 8
z = noise.sample(mu, mu[::-1], rows, seed=0)
print(hashlib.sha256(z.astype("<f4").tobytes()).hexdigest())
"""
DIGEST = "6ca44b2b6dbaa6776f8ec55a7eb1d3c0f7d772f50b0d445d576d41c67a895853"


@pytest.mark.parametrize("disabled", ["", " ".join(__cpu_dispatch__)], ids=["all", "baseline"])
def test_samples_have_the_same_bits_on_every_processor(disabled: str):
    """On one without this one's vector instructions, too, on which np.exp has other bits."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NPY_DISABLE_CPU_FEATURES": disabled}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [DIGEST], done.stderr


def test_moments_that_are_not_finite_give_samples_that_are_not():
    bad = np.array([[np.nan], [np.inf], [-np.inf], [0.0]], np.float32)
    zeros = np.zeros_like(bad)
    for mu, logvar in ((bad, zeros), (zeros, bad)):
        z = noise.sample(mu, logvar, np.arange(4), seed=0)
        assert np.isfinite(z).ravel().tolist() == [False, False, False, True]
