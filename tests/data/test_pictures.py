"""Pictures before they are packed: the bound, and photos that are scaled while they are decoded."""

import io
from functools import cache

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.pack.pictures import prepared
from pipeline.data.pack.sources.base import Broken, Picture, Sample
from tests.data.awkward_jpeg import EXIF_MARK, segment
from tests.data.image_truth import exif


def packed(content, suffix="jpg", **settings):
    """The packed picture, or the reason why it is left out."""
    picture = Picture("a." + suffix, suffix, content, **{"resize": None, **settings})
    found = prepared(Sample("a", {}, picture))
    if isinstance(found, Broken):
        return found.reason
    return next(iter(found.members.values()))


@cache
def photo(height, width):
    """Smooth areas, noise of all sizes, hard edges: what scaling can get wrong."""
    rng = np.random.default_rng(0)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1
    noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.2
    pixels = np.moveaxis(np.fft.irfft2(noise, s=(height, width)), 0, 2)
    pixels = pixels / pixels.std() * 45 + 120
    pixels[height // 4 : height // 2, width // 4 : width // 3] = 250
    pixels[: height // 6, : width // 4 : 37] = 20
    return np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))


def pixels_of(content):
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def test_large_photo_of_72_megapixels_is_packed_by_resize():
    content = simplejpeg.encode_jpeg(np.full((8000, 9000, 1), 90, np.uint8), 80, "GRAY", "Gray")
    small = pixels_of(packed(content, resize=64))
    assert small.shape == (64, 72)
    assert np.abs(small - 90).max() <= 1
    assert packed(content) == ("size: 9000 x 8000 pixels are more than --max-pixels = 67108864")


@pytest.mark.parametrize("sampling", ["444", "420"])
@pytest.mark.parametrize(
    "max_pixels, most, beyond_two", [(500_000, 2, 0), (70_000, 3, 0.001), (18_000, 6, 0.01)]
)
def test_scaling_while_decoding_hardly_changes_a_pixel(sampling, max_pixels, most, beyond_two):
    """Reductions to a half, a quarter and an eighth, here twice as large as wanted."""
    content = simplejpeg.encode_jpeg(photo(903, 1197), 92, "RGB", sampling)
    # Named .png, so that what is packed is without loss.
    whole = pixels_of(packed(content, "png", resize=50))
    scaled = pixels_of(packed(content, "png", resize=50, max_pixels=max_pixels))
    assert whole.shape == scaled.shape
    difference = np.abs(whole - scaled)
    assert 0 < difference.max() <= most
    assert (difference > 2).mean() <= beyond_two


def test_what_the_bound_allows_is_decoded_in_full_as_before():
    content = simplejpeg.encode_jpeg(photo(300, 400), 92)
    assert packed(content, resize=32, max_pixels=120_000) == packed(content, resize=32)


def test_a_photo_is_upright_after_scaling():
    content = simplejpeg.encode_jpeg(photo(304, 400), 95)
    tag = segment(0xE1, EXIF_MARK + exif(6))
    options = {"suffix": "png", "resize": 32, "max_pixels": 40_000}
    turned = pixels_of(packed(content[:2] + tag + content[2:], **options))
    plain = pixels_of(packed(content, **options))
    assert turned.shape == (42, 32, 3)
    assert np.abs(turned - np.rot90(plain, -1)).mean() < 0.5


def test_what_cannot_be_scaled_enough_is_left_out_with_the_options_name():
    content = simplejpeg.encode_jpeg(photo(300, 400), 92)
    reason = packed(content, resize=60, max_pixels=20_000)
    assert reason == "size: 200 x 150 pixels are more than --max-pixels = 20000"
    file = io.BytesIO()
    Image.fromarray(photo(300, 400)).save(file, "JPEG", progressive=True)
    # All coefficients of a progressive file are held at once, however small it becomes.
    assert "400 x 300 pixels" in packed(file.getvalue(), resize=32, max_pixels=20_000)
    file = io.BytesIO()
    Image.fromarray(photo(300, 400)).save(file, "PNG")
    reason = packed(file.getvalue(), "png", resize=32, max_pixels=20_000)
    assert reason == "size: 400 x 300 pixels are more than --max-pixels = 20000"


@pytest.mark.parametrize("text", ["damaged", "huge"])
def test_texts_that_nobody_needs_keep_no_png_out_of_the_pack(text):
    """Also where channels and bits are looked up for resizing."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_text("comment", "x" * (3 << 20 if text == "huge" else 9), zip=True)
    file = io.BytesIO()
    Image.new("LA", (64, 64), (10, 200)).save(file, "PNG", pnginfo=notes)
    content = bytearray(file.getvalue())
    if text == "damaged":
        content[content.find(b"zTXt") + 12] ^= 1
    assert pixels_of(packed(bytes(content), "png", resize=32)).shape == (32, 32, 4)
