"""The random numbers are a pure function of their key, and look random in every direction."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.common import rng

NUM = 256


def keys(*, seed: int = 0, stream: str = "test", epoch: int = 0, first: int = 0) -> Tensor:
    uid = torch.arange(first, first + NUM)
    return rng.sample_keys(seed, stream, epoch=torch.full((NUM,), epoch), uid=uid)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def splitmix_reference(key: int, num_elements: int) -> list[int]:
    """32-bit words by plain integers: SplitMix64 with the sample's own gamma, low half first."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z &= mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    gamma = mix((key & mask) ^ 0x9E3779B97F4A7C15) | 1
    words: list[int] = []
    for j in range(1, (num_elements + 1) // 2 + 1):
        z = mix((key & mask) + gamma * j)
        words += [z & 0xFFFFFFFF, z >> 32]
    return words[:num_elements]


def test_uniforms_equal_the_integer_reference() -> None:
    for key in keys()[:5].tolist():
        expected = [(word >> 8) / 2**24 for word in splitmix_reference(key, 9)]
        assert rng.uniform(torch.tensor([key]), (9,))[0].tolist() == expected


def test_a_sample_does_not_depend_on_its_batch_or_on_the_number_of_elements() -> None:
    whole = rng.normal(keys(), (3, 5, 7))
    for rows in (slice(0, 1), slice(10, 13), slice(255, 256)):
        torch.testing.assert_close(rng.normal(keys()[rows], (3, 5, 7)), whole[rows], rtol=0, atol=0)
    shorter = rng.uniform(keys(), (10,))
    assert torch.equal(shorter, rng.uniform(keys(), (101,))[:, :10])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"stream": "tesu"},
        {"epoch": 1},
        {"first": NUM},
        {"first": 2**48},
    ],
)
def test_seeds_streams_epochs_and_samples_are_uncorrelated(other: dict[str, int]) -> None:
    a, b = rng.uniform(keys(), (1000,)), rng.uniform(keys(**other), (1000,))
    assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel())


def test_substreams_are_uncorrelated() -> None:
    a = rng.uniform(rng.substream(keys(), "a"), (1000,))
    b = rng.uniform(rng.substream(keys(), "b"), (1000,))
    assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel())
    assert abs(correlation(a, rng.uniform(keys(), (1000,)))) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 32])
def test_elements_and_neighbouring_samples_are_uncorrelated(lag: int) -> None:
    values = rng.uniform(keys(), (1000,))
    bound = 5 / math.sqrt(values.numel() / 2)
    assert abs(correlation(values[:, :-lag], values[:, lag:])) < bound
    assert abs(correlation(values[:-lag], values[lag:])) < bound
    normals = rng.normal(keys(), (1000,))
    assert abs(correlation(normals[:, :-lag], normals[:, lag:])) < bound


def test_uniforms_are_uniform() -> None:
    values = rng.uniform(keys(), (4000,)).numpy().ravel()
    assert values.min() >= 0
    assert values.max() < 1
    counts, _ = np.histogram(values, bins=256, range=(0, 1))
    expected = values.size / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 255 + 5 * math.sqrt(2 * 255)


def test_every_bit_is_fair() -> None:
    words = (rng.uniform(keys(), (4000,)).double() * 2**24).to(torch.int64)
    for bit in range(24):
        share = ((words >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(words.numel())


def test_normals_are_normal() -> None:
    values = rng.normal(keys(), (4000,)).double()
    n = values.numel()
    assert abs(values.mean().item()) < 5 / math.sqrt(n)
    assert abs(values.var().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**3).mean().item()) < 5 * math.sqrt(15 / n)
    assert abs((values**4).mean().item() - 3) < 5 * math.sqrt(96 / n)
    for z in (-3.0, -1.0, 0.5, 2.0):
        share = (values < z).double().mean().item()
        expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(z)).item()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_values_are_frozen() -> None:
    """A change here changes every corruption and every posterior sample of every user."""
    uid = torch.tensor([0, 1, 2**40])
    found = rng.sample_keys(7, "train/corruption", epoch=torch.tensor([0, 1, 2]), uid=uid)
    assert found.tolist() == FROZEN_KEYS
    assert (rng.uniform(found, (2,)) * 2**24).to(torch.int64).tolist() == FROZEN_WORDS


FROZEN_KEYS = [-9193522093610820617, 5845319566267497855, -149920577925405827]
FROZEN_WORDS = [[3225962, 15087490], [10658497, 5948753], [6790193, 3729145]]
