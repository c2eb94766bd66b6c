"""Random numbers on a card are those of the CPU; needs torch alone."""

import pytest
import torch

from pipeline.common import rng

pytestmark = pytest.mark.gpu
KEYS = rng.sample_keys(3, "gpu", epoch=torch.arange(64) // 7, uid=torch.arange(64))
SHAPE = (3, 33, 5)


def test_keys_and_uniforms_have_the_same_bits(device: torch.device):
    epoch, uid = (torch.arange(64, device=device) // 7, torch.arange(64, device=device))
    assert torch.equal(rng.sample_keys(3, "gpu", epoch=epoch, uid=uid).cpu(), KEYS)
    found = rng.uniform(KEYS.to(device), SHAPE)
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), rng.uniform(KEYS, SHAPE))


def test_normals_differ_by_the_last_digits_of_logarithm_and_cosine(device: torch.device):
    found, expected = rng.normal(KEYS.to(device), SHAPE).cpu(), rng.normal(KEYS, SHAPE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
