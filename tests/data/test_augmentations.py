"""Augmentations: keyed by sample and epoch, within the image, as their formulas say."""

import io
import math
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.corruptions import Masking
from pipeline.data.augmentations import (
    Augmentation,
    Augmenter,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    View,
)
from pipeline.data.decode import ImageDecode
from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.settings import DataConfig
from tests.data.streams import SEED, forward_of, write_shards
from tests.shards import open_stream, png, tiny_image

SIZE = 16
EXAMPLES = {
    "horizontal_flip": HorizontalFlip(),
    "random_crop": RandomCrop(shorter_side=20),
    "random_resized_crop": RandomResizedCrop(),
}
KINDS = [kind.model_fields["kind"].default for kind in get_args(get_args(Augmentation)[0])]
SHAPES = [(32, 32), (20, 61), (61, 20), (16, 16), (17, 400)]


def views(augmentations, shape, count=400, seed=0, size=(SIZE, SIZE)) -> list[View]:
    augmenter = Augmenter(augmentations, seed, size)
    uid = np.arange(count)
    draws = augmenter.draw(np.zeros(count, np.int64), uid)
    return [augmenter.view_of(row)(*shape) for row in draws]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(SIZE, SIZE), (12, 31), (40, 16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_lies_within_the_image(kind, shape, size):
    for view in views([EXAMPLES[kind]], shape, size=size):
        assert view.height > 0
        assert view.width > 0
        assert view.top >= 0
        # A crop at a scale may lead out by half a pixel of it, which the decoder cuts off.
        slack = 0.5 * view.height / size[0] if kind == "random_crop" else 0.0
        assert view.top + view.height <= shape[0] + slack + 1e-9
        assert view.left >= 0
        assert view.left + view.width <= shape[1] + slack + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_seed_epoch_and_sample_alone(kind):
    one, other = (Augmenter([EXAMPLES[kind]], seed, (SIZE, SIZE)) for seed in (0, 1))
    uid, epoch = np.arange(50), np.arange(50) % 3
    draws = one.draw(epoch, uid)
    shuffle = np.random.default_rng(0).permutation(50)
    assert (one.draw(epoch[shuffle], uid[shuffle]) == draws[shuffle]).all()
    assert (one.draw(epoch + 1, uid) != draws).any(axis=1).all()
    assert (other.draw(epoch, uid) != draws).any(axis=1).all()
    assert draws.shape == (50, EXAMPLES[kind].num_draws)


def decode_views(data: bytes, augmentations, count=60, size=SIZE) -> list[np.ndarray]:
    decode = ImageDecode(size=size)
    augmenter = Augmenter(augmentations, 0, decode.height_and_width)
    found = []
    for draws in augmenter.draw(np.zeros(count, np.int64), np.arange(count)):
        out = np.zeros(decode.buffer_shape, np.uint8)
        decode.decode_view(data, out, augmenter.view_of(draws))
        found.append(out)
    return found


def test_a_flip_mirrors_half_of_the_samples_exactly():
    image = tiny_image(3, SIZE)
    found = decode_views(png(image), [HorizontalFlip()], count=400)
    mirrored = [np.array_equal(out, image[:, ::-1]) for out in found]
    assert all(
        np.array_equal(out, image)
        for out, is_one in zip(found, mirrored, strict=True)
        if not is_one
    )
    assert 160 < sum(mirrored) < 240  # 4 standard deviations around 200
    assert all(v.is_mirrored for v in views([HorizontalFlip(probability=1.0)], (8, 8)))


def test_a_crop_at_the_images_own_scale_is_a_piece_of_it():
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    pieces = {
        image[top : top + SIZE, left : left + SIZE].tobytes(): (top, left)
        for top in range(20 - SIZE + 1)
        for left in range(24 - SIZE + 1)
    }
    found = decode_views(png(image), [RandomCrop(shorter_side=20)], count=600)
    places = [pieces[out.tobytes()] for out in found]
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 45  # every place occurs
    chi_square = ((counts - 600 / 45) ** 2 / (600 / 45)).sum()
    assert chi_square < 44 + 5 * math.sqrt(88)


@pytest.mark.parametrize("shape", [(40, 60), (30, 75), (50, 40)])
def test_a_crop_of_another_shape_covers_its_larger_rectangle(shape):
    """Against Pillow: resized until 24 x 36 is covered, then 16 x 24 of it at every place."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scale = max(24 / shape[0], 36 / shape[1])
    height, width = (round(side * scale) for side in shape)
    found = views([RandomCrop(shorter_side=24)], shape, count=3000, size=(16, 24))
    for view in found:
        assert (view.height, view.width) == pytest.approx((16 / scale, 24 / scale))
    for starts, wanted, whole in (
        ([view.top for view in found], 16, height),
        ([view.left for view in found], 24, width),
    ):
        assert sorted({round(start * scale) for start in starts}) == [*range(whole - wanted + 1)]
    out = decode_views(png(image), [RandomCrop(shorter_side=24)], count=1, size=(16, 24))[0]
    [view] = views([RandomCrop(shorter_side=24)], shape, count=1, size=(16, 24))
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    expected = Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC, box=box)
    assert np.array_equal(out, expected)


def test_resized_crops_of_another_shape_are_distorted_no_more():
    crop = RandomResizedCrop(scale=(0.1, 0.3), ratio=(0.8, 1.25))
    found = views([crop], (300, 300), count=500, size=(10, 30))
    distortion = np.log([v.width / v.height / 3 for v in found])
    assert abs(distortion).max() < math.log(1.25) + 0.03
    assert abs(distortion.mean()) < 0.03


def test_resized_crops_have_the_area_and_ratio_that_were_asked_for():
    crop = RandomResizedCrop(scale=(0.2, 0.8), ratio=(0.5, 2.0))
    found = views([crop], (300, 300), count=3000)
    area = np.array([v.height * v.width for v in found]) / 300**2
    ratio = np.log([v.width / v.height for v in found])
    assert area.min() > 0.19
    assert area.max() < 0.81
    assert abs(ratio).max() < math.log(2) + 0.02
    # Large parts of extreme ratio do not fit, so both means lie a little inside.
    assert 0.44 < area.mean() < 0.51
    assert abs(ratio.mean()) < 0.03
    assert np.std([v.top for v in found]) > 20


def test_an_impossible_ratio_takes_the_largest_central_part():
    crop = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    for view in views([crop], (20, 50), count=5):
        assert (view.height, view.width) == (20, 20)


def test_a_jpeg_scaled_down_by_its_decoder_shows_the_same_part():
    grid = np.add.outer(np.arange(512), np.arange(768)) % 256
    smooth = np.stack([grid / 4, 255 - grid / 4, np.full_like(grid, 90)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=98)
    stored = np.asarray(Image.open(io.BytesIO(file.getvalue())))
    crops = [RandomResizedCrop(scale=(0.3, 1.0)), HorizontalFlip()]
    scaled = decode_views(file.getvalue(), crops, count=30)
    whole = decode_views(png(stored), crops, count=30)
    for one, other in zip(scaled, whole, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 4


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_photograph_is_cut_upright(orientation):
    upright = Image.fromarray(tiny_image(8, 40).repeat(2, axis=1))  # 40 x 80
    exif = Image.Exif()
    exif[0x0112] = orientation

    def photograph(way: Image.Transpose) -> bytes:
        file = io.BytesIO()
        upright.transpose(way).save(file, "JPEG", quality=100, subsampling=0, exif=exif)
        return file.getvalue()

    def shown(data: bytes) -> np.ndarray:
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))

    def error(way: Image.Transpose) -> float:
        pixels = shown(photograph(way))
        same_shape = pixels.shape == (40, 80, 3)
        return np.abs(pixels.astype(int) - upright).mean() if same_shape else math.inf

    data = photograph(min(Image.Transpose, key=error))  # how a camera would have stored it
    crops = [RandomCrop(shorter_side=40)]  # at its own scale: nothing is resampled
    one, other = decode_views(data, crops, count=8), decode_views(png(shown(data)), crops, count=8)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(one, other, strict=True)) <= 1


def test_the_stream_augments_alike_on_any_number_of_processes(tmp_path):
    write_shards(tmp_path / "shards", (9, 14, 5))
    index = build_index(tmp_path / "shards", split=SplitSpec(fractions={"train": 1.0}))
    crops = (RandomResizedCrop(scale=(0.3, 1.0)), HorizontalFlip())

    def epochs(world, threads, augmentations=crops):
        found = {}
        for rank in range(world):
            data = DataConfig(
                path=str(index.path), split="all", decode=ImageDecode(size=SIZE), lanes=4,
                window=3, threads=threads, augmentations=augmentations,
            )  # fmt: skip
            with open_stream(
                data, index=index, seed=SEED, batch_size=12, num_steps=5, rank=rank, world=world
            ) as stream:
                for batch in stream:
                    for key, epoch, x in zip(
                        batch.keys, batch.epoch.tolist(), batch.x, strict=True
                    ):
                        found[key, epoch] = x.numpy().tobytes()
        return found

    whole, plain = epochs(1, 1), epochs(1, 2, ())
    assert whole == epochs(2, 3) == epochs(3, 2)
    changed = [whole[key, 0] != whole[key, 1] for key, epoch in whole if epoch == 1]
    assert sum(changed) > 0.9 * len(changed)
    assert all(plain[key, 0] == plain[key, 1] for key, epoch in plain if epoch == 1)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"augmentations": [{"kind": "random_crop", "shorter_side": 60}]},
            "below 64, the shorter side",
        ),
        (
            {
                "augmentations": [{"kind": "random_crop", "shorter_side": 40}],
                "decode": {"kind": "image", "size": [100, 48]},
            },
            "shorter_side 40 is below 48, the shorter side of decode.size",
        ),
        (
            {"augmentations": [{"kind": "random_resized_crop", "scale": [1, 0.5]}]},
            r"must be \[lowest, highest\]",
        ),
        (
            {
                "augmentations": [{"kind": "horizontal_flip"}],
                "decode": {"kind": "array", "shape": [3], "range": [0, 1]},
            },
            "decode.kind is array",
        ),
    ],
)
def test_what_cannot_be_augmented_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"path": "p", **settings})


def test_augmented_images_are_the_targets(tmp_path):
    write_shards(tmp_path / "shards", (24,))
    index = build_index(tmp_path / "shards", split=SplitSpec(fractions={"train": 1.0}))
    decode = ImageDecode(size=SIZE)
    forward = forward_of(decode, [Masking(fraction=0.5)])
    x = {}
    for augmentations in ((), (HorizontalFlip(probability=1.0),)):
        data = DataConfig(
            path=str(index.path), split="all", decode=decode, augmentations=augmentations
        )
        with open_stream(data, index=index, seed=SEED, batch_size=24, num_steps=1) as stream:
            inputs = forward.inputs(next(stream), "train")
            x[len(augmentations)] = (inputs.clean.clone(), inputs.mask)
    assert torch.equal(x[0][0].flip(-1), x[1][0])
    assert torch.equal(x[0][1], x[1][1])  # the corruption draws from a stream of its own
