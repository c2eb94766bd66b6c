"""`encode` against the export of the same model: same decoder, same size, same numbers."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import latentmill as lm
from latentmill.inputs import list_items, stack
from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.latents import LatentRows
from pipeline.models.interchange import from_pretrained
from tests.latentmill.world import EXPORT_BATCH, SIZE, World, png


@pytest.fixture
def rows(world: World) -> LatentRows:
    return lm.LatentDataset(world.export)[:]


def pixels(height: int, width: int, *channels: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(height))
    return generator.integers(0, 256, (height, width, *channels), np.uint8)


def same(codes: lm.Codes, others: lm.Codes, tolerance: float = 1e-5) -> bool:
    assert codes.logvar is not None
    assert others.logvar is not None
    pairs = ((codes.mu, others.mu), (codes.logvar, others.logvar))
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def test_every_file_gives_the_rows_of_the_export(
    model: lm.LoadedModel, rows: LatentRows, files: list[Path]
):
    assert rows.valid.all()
    assert {path.suffix for path in files} == {".jpg", ".png", ".webp"}
    codes = model.encode(files)
    assert rows.logvar is not None
    assert codes.logvar is not None
    assert np.abs(codes.mu.numpy() - rows.mu).max() < 1e-5
    assert np.abs(codes.logvar.numpy() - rows.logvar).max() < 1e-5
    assert rows.mu.std(axis=0).min() > 1e-3  # the photos differ by more


def test_padded_as_the_export_pads_the_bits_are_its_own(
    model: lm.LoadedModel, rows: LatentRows, files: list[Path]
):
    for start in range(0, len(files), 9):  # batches never span shards
        shard = slice(start, min(start + 9, len(files)))
        codes = model.encode(files[shard], batch_size=EXPORT_BATCH)
        assert codes.mu.numpy().tobytes() == rows.mu[shard].tobytes()
        assert codes.logvar is not None
        assert rows.logvar is not None
        assert codes.logvar.numpy().tobytes() == rows.logvar[shard].tobytes()
    row = next(n for n, path in enumerate(files) if path.suffix == ".jpg")
    alone = model.encode(files[row], batch_size=EXPORT_BATCH)
    assert alone.mu.numpy().tobytes() == rows.mu[row : row + 1].tobytes()


def test_a_sample_is_that_of_the_export(model: lm.LoadedModel, rows: LatentRows, files: list[Path]):
    codes = model.encode(files)
    assert np.abs(codes.sample(seed=3).numpy() - rows.sample(seed=3)).max() < 1e-5
    assert torch.equal(codes.sample(), codes.sample(seed=0))
    assert not torch.equal(codes.sample(seed=1), codes.sample(seed=0))


def test_a_run_gives_what_its_exported_model_gives(
    world: World, model: lm.LoadedModel, files: list[Path]
):
    newest, best = lm.load(world.run), lm.load(world.run, step="best")
    assert torch.equal(newest.encode(files).mu, model.encode(files).mu)
    assert torch.equal(best.encode(files).mu, lm.load(world.run, step=4).encode(files).mu)
    assert not torch.equal(lm.load(world.run, step=2).encode(files).mu, model.encode(files).mu)


def test_a_path_bytes_and_one_of_a_list_are_the_same(model: lm.LoadedModel, files: list[Path]):
    path = files[0]
    one = model.encode(path)
    assert one.mu.shape == (1, *model.latent_shape)
    for given in (str(path), path.read_bytes(), [path], bytearray(path.read_bytes()), iter([path])):
        assert torch.equal(model.encode(given).mu, one.mu)
    several = model.encode(files)
    assert len(several) == len(files)
    assert same(lm.Codes(several.mu[:1], several.logvar[:1]), one)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1"])
def test_an_image_in_memory_is_its_lossless_file(model: lm.LoadedModel, mode: str):
    image = Image.fromarray(pixels(45, 70, 4)).convert(mode)
    assert torch.equal(model.encode(image).mu, model.encode(png(image)).mu)


@pytest.mark.parametrize(
    "shape", [(50, 40, 3), (50, 40), (50, 40, 1), (50, 40, 4), (SIZE, SIZE, 3)]
)
def test_an_array_is_its_lossless_file(model: lm.LoadedModel, shape: tuple[int, ...]):
    array = pixels(*shape)
    expected = model.encode(png(Image.fromarray(array.squeeze()))).mu
    given: list[Any] = [array, torch.from_numpy(array), np.asfortranarray(array), [array]]
    if array.ndim == 3:
        given += [array.transpose(2, 0, 1), torch.from_numpy(array).permute(2, 0, 1)]
        given += [array[np.newaxis]]
    for one in given:
        assert torch.equal(model.encode(one).mu, expected)


def test_a_batch_of_pixels_is_its_images(model: lm.LoadedModel):
    batch = np.stack([pixels(40, 50, 3), pixels(40, 50, 3)[::-1]])
    expected = model.encode(list(batch))
    assert torch.equal(model.encode(batch).mu, expected.mu)
    assert torch.equal(model.encode(torch.from_numpy(batch).permute(0, 3, 1, 2)).mu, expected.mu)


def test_floats_are_what_the_network_takes(world: World, model: lm.LoadedModel):
    x = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    module = from_pretrained(world.model)
    with torch.no_grad():
        posterior = module(x, mode="encode").posterior
    expected = lm.Codes(posterior.mu, posterior.logvar)
    for given in (x, x.numpy(), x.double(), list(x), x.clone().requires_grad_()):
        assert same(model.encode(given), expected, tolerance=1e-6)
    assert same(model.encode(x[0]), lm.Codes(expected.mu[:1], posterior.logvar[:1]), 1e-6)
    pixels_ = (x * 255).byte()
    assert same(model.encode(pixels_ / 255), model.encode(pixels_), tolerance=1e-6)


def test_kinds_mix_in_a_list_and_chunks_change_little(model: lm.LoadedModel, files: list[Path]):
    unit = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mixed = [files[0], unit, pixels(9, 9), files[1].read_bytes(), Image.open(files[2])]
    each = torch.cat([model.encode(one).mu for one in mixed])
    assert torch.allclose(model.encode(mixed).mu, each, atol=1e-6)
    many = mixed * 20  # more than one chunk
    assert torch.allclose(model.encode(many).mu, each.repeat(20, 1), atol=1e-6)
    assert torch.allclose(model.encode(many, batch_size=7).mu, each.repeat(20, 1), atol=1e-6)


def test_nothing_keeps_gradients_or_the_programs_settings(model: lm.LoadedModel, files: list[Path]):
    codes = model.encode(files[:2])
    assert not codes.mu.requires_grad
    assert not model.decode(codes.mu).requires_grad
    torch.nn.Linear(codes.mu.shape[1], 1)(codes.mu).sum().backward()  # no inference tensors
    torch.backends.cudnn.benchmark = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.encode(files[:2]).mu, codes.mu)
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("shape", [(50, 40), (50, 40, 3), (4, 50, 41)])
def test_sixteen_bits_count_in_arrays_images_and_files_alike(
    model: lm.LoadedModel, shape: tuple[int, ...]
):
    deep = np.random.default_rng(2).integers(0, 65536, shape).astype(np.uint16)
    assert torch.equal(model.encode(deep).mu, model.encode((deep >> 8).astype(np.uint8)).mu)
    last = np.moveaxis(deep, 0, -1) if shape[0] == 4 else deep
    order = {2: slice(None), 3: [2, 1, 0], 4: [2, 1, 0, 3]}[last.shape[-1] if last.ndim > 2 else 2]
    file = cv2.imencode(".png", last[..., order])[1].tobytes()
    decode = ImageDecode(size=[16, 24], dtype="uint16")
    given: list[Any] = [file, deep, torch.from_numpy(deep)]
    given += [Image.fromarray(deep)] if deep.ndim == 2 else []
    with ThreadPoolExecutor(1) as pool:
        stored = stack(list_items(given, decode), decode, len(given), pool)
    assert stored.dtype == torch.uint16
    assert len(np.unique(stored.numpy().reshape(len(given), -1), axis=0)) == 1
    assert (stored.numpy() % 257 != 0).any()
    bytes_alone = np.zeros(decode.buffer_shape, np.uint16)
    decode.decode_image(Image.fromarray(pixels(16, 24, 3)), bytes_alone)
    assert np.array_equal(bytes_alone, pixels(16, 24, 3).astype(np.uint16) * 257)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "size": (
        lambda: torch.zeros(2, 3, 256, 256),
        "this model takes [B, 3, 32, 32] in [0, 1]; got [2, 3, 256, 256]",
    ),
    "channels": (lambda: np.zeros((2, 1, 32, 32), np.float32), "got [2, 1, 32, 32]"),
    "channels last": (lambda: np.zeros((2, 32, 32, 3), np.float32), "got [2, 32, 32, 3]"),
    "0 to 255": (lambda: torch.rand(1, 3, 32, 32) * 255, "in [0, 1]; got values in [0."),
    "-1 to 1": (lambda: torch.linspace(-1, 1, 3072).view(3, 32, 32), "got values in [-1, 1]"),
    "nan": (lambda: torch.full((3, 32, 32), torch.nan), "got values in [nan, nan]"),
    "int64": (lambda: torch.zeros(3, 32, 32, dtype=torch.int64), "has the type int64"),
    "text array": (lambda: np.array(["a.jpg"]), "has the type <U5"),
    "two ends": (lambda: np.zeros((3, 9, 3), np.uint8), "either end may be the channels"),
    "no end": (lambda: np.zeros((5, 9, 9), np.uint8), "no end can be the channels"),
    "vector": (lambda: np.zeros(9, np.uint8), "uint8 [9]; an image is [H, W] or [H, W, C]"),
    "five": (lambda: np.zeros((1, 1, 9, 9, 3), np.uint8), "uint8 [1, 1, 9, 9, 3]"),
    "batch in list": (lambda: [torch.zeros(2, 3, 32, 32)], "input 0 of the list is a batch"),
    "nothing": (list, "an empty list or batch"),
    "empty batch": (lambda: torch.zeros(0, 3, 32, 32), "an empty list or batch"),
    "number": (lambda: 5, "encode takes paths, bytes, PIL images"),
    "number in list": (lambda: [5], "input 0 is a int"),
    "mapping": (lambda: {"a.jpg": 1}, "got a dict"),
    "url": (lambda: "https://host/a.jpg", "https://host/a.jpg is a URL"),
    "missing": (lambda: ["no/such.jpg"], "no/such.jpg cannot be read: No such file or directory"),
    "directory": (lambda: Path(__file__).parent, "cannot be read: Is a directory"),
    "no image": (lambda: [b"\xff\xd8\xffno"], "input 0 cannot be used: JPEG: "),
    "mode": (lambda: Image.new("F", (9, 9)), "pixels of mode F have no declared range"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_words(model: lm.LoadedModel, name: str):
    given, words = WRONG[name]
    with pytest.raises(UserError, match=re.escape(words)):
        model.encode(given())


def test_a_broken_file_is_named(model: lm.LoadedModel, files: list[Path], tmp_path: Path):
    broken = tmp_path / "broken.jpg"
    shutil.copy(files[0], broken)
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=f"^{re.escape(str(broken))} cannot be used: JPEG: "):
        model.encode([*files, broken])
    with pytest.raises(UserError, match="batch_size is 0, but must be at least 1"):
        model.encode(files, batch_size=0)
