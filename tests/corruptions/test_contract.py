"""Every corruption: pure, keyed by sample, input untouched; and each kind's own statistics."""

import math
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.common import rng
from pipeline.corruptions import Corruption, corrupt
from pipeline.corruptions.base import CorruptionBase
from pipeline.corruptions.gaussian_noise import GaussianNoise
from pipeline.corruptions.masking import Masking
from pipeline.corruptions.patch_mask import PatchMask
from pipeline.corruptions.salt_and_pepper import SaltAndPepper

KINDS: tuple[type[CorruptionBase], ...] = get_args(get_args(Corruption)[0])
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
B = 64


def batch() -> Tensor:
    values = torch.rand(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return values.mul(0.8).add(0.1).to(memory_format=torch.channels_last)


def keys(epoch: int = 0) -> Tensor:
    epochs = torch.full((B,), epoch)
    return rng.sample_keys(0, "train/corruption", epoch=epochs, uid=torch.arange(B))


@each_kind
def test_contract(kind: type[CorruptionBase]) -> None:
    x, corruption = batch(), kind()
    before = x.clone()
    corrupted, mask = corrupt(x, [corruption], keys())
    assert torch.equal(x, before)
    assert corrupted.shape == x.shape
    assert corrupted.dtype == x.dtype
    assert not torch.equal(corrupted, x)
    assert corruption.has_mask == (mask is not None)
    if mask is not None:
        assert mask.dtype == torch.bool
        assert mask.shape == x.shape
        assert torch.equal(corrupted[~mask], x[~mask])
        assert (corrupted[mask] != x[mask]).all()
    part = corrupt(x[10:13], [corruption], keys()[10:13])
    assert torch.equal(part.x, corrupted[10:13])
    assert not torch.equal(corrupt(x, [corruption], keys(epoch=1)).x, corrupted)
    doubles = corrupt(x.double(), [corruption], keys()).x
    assert doubles.dtype == torch.float64
    torch.testing.assert_close(doubles.float(), corrupted, rtol=1e-6, atol=1e-6)


@each_kind
def test_severity_may_be_drawn_per_sample(kind: type[CorruptionBase]) -> None:
    name = "sigma" if kind is GaussianNoise else "fraction"
    corruption = kind.model_validate({name: (0.1, 0.9)})
    x = torch.full((B, 3, 32, 32), 0.5)
    changed = (corrupt(x, [corruption], keys()).x - x).abs().flatten(1).mean(1)
    full = (corrupt(x, [kind.model_validate({name: 0.9})], keys()).x - x).abs().mean().item()
    severity = 0.9 * changed / full
    assert abs(severity.mean().item() - 0.5) < 5 * 0.8 / math.sqrt(12 * B) + 0.02
    assert severity.min() < 0.2
    assert severity.max() > 0.8


@each_kind
def test_bad_severities_are_refused(kind: type[CorruptionBase]) -> None:
    name = "sigma" if kind is GaussianNoise else "fraction"
    for wrong in (-0.1, (0.5, 0.2), float("nan")):
        with pytest.raises(ValidationError):
            kind.model_validate({name: wrong})
    if kind is not GaussianNoise:
        with pytest.raises(ValidationError):
            kind.model_validate({name: 1.1})


def test_gaussian_noise_is_white() -> None:
    x = batch()
    noise = (corrupt(x, [GaussianNoise(sigma=0.2)], keys()).x - x).double()
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 * 0.2 / math.sqrt(n)
    assert abs(noise.std().item() - 0.2) < 5 * 0.2 / math.sqrt(2 * n)


@pytest.mark.parametrize("kind", [Masking, SaltAndPepper])
def test_elements_are_hit_independently(kind: type[CorruptionBase]) -> None:
    mask = corrupt(batch(), [kind.model_validate({"fraction": 0.3})], keys()).mask
    assert mask is not None
    hits = mask.double()
    n = hits.numel()
    assert abs(hits.mean().item() - 0.3) < 5 * math.sqrt(0.21 / n)
    pairs = (hits[..., 1:] * hits[..., :-1]).mean().item()
    assert abs(pairs - 0.09) < 5 * math.sqrt(0.09 / n) * 2
    channels = (hits[:, 0] * hits[:, 1]).mean().item()
    assert abs(channels - 0.09) < 5 * math.sqrt(0.09 / n) * 3


def test_salt_and_pepper_is_a_fair_coin() -> None:
    x = batch()
    corrupted, mask = corrupt(x, [SaltAndPepper(fraction=0.5)], keys())
    assert mask is not None
    values = corrupted[mask]
    assert set(values.unique().tolist()) == {0.0, 1.0}
    assert abs(values.double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(values.numel())


def test_masking_sets_zero() -> None:
    corrupted, mask = corrupt(batch(), [Masking(fraction=0.5)], keys())
    assert mask is not None
    assert (corrupted[mask] == 0).all()


@pytest.mark.parametrize("columns", [4, 3])
def test_patch_mask_covers_an_exact_number_of_whole_patches(columns: int) -> None:
    x, count = batch()[..., : 8 * columns], round(0.4 * 4 * columns)
    corrupted, mask = corrupt(x, [PatchMask(patch_size=8, fraction=0.4, fill=0.5)], keys())
    assert mask is not None
    assert (corrupted[mask] == 0.5).all()
    patches = mask.unflatten(2, (4, 8)).unflatten(4, (columns, 8)).transpose(3, 4)
    whole = patches.flatten(4).all(-1)
    assert torch.equal(whole, patches.flatten(4).any(-1))
    assert (whole.sum((2, 3)) == count).all()
    assert torch.equal(whole[:, 0], whole[:, 1])
    share = whole[:, 0].double().mean(0)
    assert (share - count / (4 * columns)).abs().max() < 5 * math.sqrt(0.24 / B)


def test_patches_must_tile_the_image() -> None:
    with pytest.raises(ValueError, match="patch_size 8 does not divide 30 x 32"):
        PatchMask().check_event((1, 30, 32))
    with pytest.raises(ValueError, match="needs images"):
        PatchMask().check_event((100,))


def test_composition_is_in_order_and_masks_unite() -> None:
    x = batch()
    first, second = Masking(fraction=0.2), SaltAndPepper(fraction=0.2)
    corrupted, mask = corrupt(x, [first, second], keys())
    assert mask is not None
    assert abs(mask.double().mean().item() - 0.36) < 0.01
    assert torch.equal(corrupted[~mask], x[~mask])
    assert (corrupted[mask] == 1).double().mean() < 0.3
    twice = corrupt(x, [first, first], keys()).mask
    assert twice is not None
    assert abs(twice.double().mean().item() - 0.36) < 0.01, "two places must draw apart"


def test_no_corruption_returns_the_batch() -> None:
    x = batch()
    corrupted, mask = corrupt(x, [], keys())
    assert corrupted is x
    assert mask is None
