"""The numpy twin of `pipeline.rng`: the same bits, and normals to about an ulp."""

import numpy as np
import pytest
import torch

from pipeline import rng
from pipeline.latents import noise

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
