"""The decoding contract: right pixels, documented policies, and DecodeError for all else."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipeline.data.decode import ArrayDecode, Decode, DecodeError, ImageDecode
from pipeline.data.decode.codecs import PixelRules, read_pixels

RNG = np.random.default_rng(0)


def smooth(height, width, channels=3):
    small = RNG.integers(0, 256, (5, 5, channels)).astype(np.uint8)
    image = Image.fromarray(small if channels == 3 else small[:, :, 0])
    return np.asarray(image.resize((width, height))).reshape(height, width, channels)


def encoded(pixels, kind, **options) -> bytes:
    file = io.BytesIO()
    array = np.asarray(pixels)
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, kind, **options)
    return file.getvalue()


def decoded(data, **settings_):
    decode = ImageDecode(**settings_)
    out = np.full(decode.buffer_shape, 77, np.uint8)
    decode.decode(data, out)
    return out


def pillow_pixels(data, channels):
    image = Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L")
    return np.asarray(image).reshape(image.height, image.width, channels)


@pytest.mark.parametrize("stored", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})]
)
def test_lossless_formats_are_exact(kind, options, channels, stored):
    pixels = smooth(40, 40, stored)
    data = encoded(pixels, kind, **options)
    expected = pillow_pixels(data, channels)
    assert np.array_equal(decoded(data, size=40, channels=channels), expected)
    if stored == channels:
        assert np.array_equal(expected, pixels)


@pytest.mark.parametrize("stored", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_straight_into_the_slot_is_the_decoders_output(channels, stored):
    data = encoded(smooth(48, 48, stored), "JPEG", quality=90)
    colours = "RGB" if channels == 3 else "GRAY"
    expected = simplejpeg.decode_jpeg(data, colours)
    assert np.array_equal(decoded(data, size=48, channels=channels), expected)
    assert np.abs(expected.astype(int) - pillow_pixels(data, channels)).max() <= 2


def test_lossy_webp_is_the_same_by_either_decoder():
    data = encoded(smooth(50, 50), "WEBP", quality=80)
    assert data[12:16] == b"VP8 "
    assert np.array_equal(decoded(data, size=50), pillow_pixels(data, 3))


def test_cmyk_jpeg():
    file = io.BytesIO()
    pixels = smooth(32, 32)
    Image.fromarray(pixels).convert("CMYK").save(file, "JPEG", quality=95)
    assert np.abs(decoded(file.getvalue(), size=32).astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "height, width",
    [(64, 64), (64, 91), (91, 64), (200, 130), (131, 201), (17, 23), (1, 1), (500, 333)],
)
def test_any_size_becomes_the_square_in_the_middle(height, width, kind):
    """Against Pillow alone: decode, central square, resize."""
    data = encoded(smooth(height, width), kind, **({"quality": 95} if kind != "PNG" else {}))
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    image = Image.open(io.BytesIO(data)).convert("RGB")
    square = image.crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(decoded(data, size=64).astype(int) - expected)
    # A JPEG that is scaled down while decoding differs a little (up to half a pixel in place);
    # the others not at all.
    assert difference.max() <= (40 if kind == "JPEG" else 0)
    assert difference.mean() < 3


def test_shrinking_does_not_alias():
    """A checkerboard finer than the target becomes its mean."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    pixels = np.repeat(board[:, :, None], 3, 2).astype(np.uint8)
    out = decoded(encoded(pixels, "PNG"), size=64)
    assert np.abs(out.astype(int) - 127).max() <= 8


def test_large_jpegs_are_scaled_by_their_decoder():
    data = encoded(smooth(640, 960), "JPEG")
    rules = PixelRules(channels=3, background=255, max_pixels=1 << 26)
    height, width, _ = read_pixels(data, rules, lambda height, width: 64 / min(height, width)).shape
    assert 64 <= min(height, width) < 128


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind, orientation):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:20, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind != "PNG" else {}
    data = encoded(pixels, kind, exif=exif.tobytes(), **options)
    turned = {  # by definition: which side is up and which is left in the stored image
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).swapaxes(0, 1),
        8: np.rot90(pixels, 1),
    }[orientation]
    assert np.abs(decoded(data, size=64).astype(int) - turned).mean() < 3


def test_a_damaged_exif_block_counts_as_none():
    data = encoded(smooth(32, 32), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert np.array_equal(decoded(data, size=32), simplejpeg.decode_jpeg(data, "RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_is_laid_over_the_background(channels):
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :16] = (200, 100, 50, 255)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(rgba, kind, **options)
        out = decoded(data, size=32, channels=channels, background=30)
        grey = (200 * 299 + 100 * 587 + 50 * 114) / 1000
        solid = (200, 100, 50) if channels == 3 else (grey,)
        assert np.abs(out[:, :16].astype(float) - solid).max() <= 1
        assert (out[:, 16:] == 30).all()
    palette = Image.fromarray(rgba[:, :, 0]).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    assert (decoded(file.getvalue(), size=32, background=30)[:, 16:] == 30).all()


def test_sixteen_bit_png_keeps_the_high_byte():
    values = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert np.array_equal(decoded(file.getvalue(), size=32, channels=1)[:, :, 0], values >> 8)


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        out = decoded(file.getvalue(), size=32)
        assert out[..., 0].min() > 200
        assert out[..., 2].max() < 50


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


BOMBS = {
    "png": png_header(100_000, 100_000) + bytes(100),
    "webp": b"RIFF\x00\x01\x00\x00WEBPVP8X\x0a\x00\x00\x00\x10\x00\x00\x00"
    + b"\xff\x3f\x00" * 2
    + bytes(90),
    "jpeg": encoded(np.zeros((8, 8, 3), np.uint8), "JPEG").replace(
        b"\x08\x00\x08\x00\x08\x03", b"\x08\xea\x60\xea\x60\x03"
    ),
    "ppm": b"P6 60000 60000 255\n" + bytes(100),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_by_their_header(kind):
    with pytest.raises(DecodeError) as caught:
        decoded(BOMBS[kind], size=64)
    assert caught.value.stage == "size"


def test_max_pixels_is_the_bound():
    data = encoded(smooth(30, 40), "PNG")
    decoded(data, size=16, max_pixels=1200)
    with pytest.raises(DecodeError, match="40 x 30 pixels are more than decode.max_pixels = 1199"):
        decoded(data, size=16, max_pixels=1199)
    jpeg = encoded(smooth(30, 40), "JPEG")
    with pytest.raises(DecodeError, match="max_pixels"):
        decoded(jpeg, size=16, max_pixels=1199)


GOOD = {
    "jpeg": encoded(smooth(32, 32), "JPEG"),
    "png": encoded(smooth(32, 32), "PNG"),
    "webp": encoded(smooth(32, 32), "WEBP"),
    "lossless": encoded(smooth(32, 32), "WEBP", lossless=True),
    "gif": encoded(smooth(32, 32), "GIF"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_truncated_images_are_faults(kind):
    data = GOOD[kind]
    for keep in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(DecodeError):
            decoded(data[: int(len(data) * keep)], size=32)


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"garbage" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff", b"RIFF"]
)
def test_garbage_is_a_fault(data):
    with pytest.raises(DecodeError) as caught:
        decoded(data, size=32)
    assert caught.value.stage == "decode"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_gives_an_image_or_a_fault_and_nothing_else(kind, place, bits):
    data = bytearray(GOOD[kind])
    data[place % len(data)] ^= bits
    try:
        image = decoded(bytes(data), size=32)
    except DecodeError as error:
        fault = error.stage
    else:
        fault = None
        assert image.shape[:2] == (32, 32)
    assert fault in (None, "decode", "size")


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def read_array(data, **settings_):
    decode = ArrayDecode(**settings_)
    out = np.zeros(decode.buffer_shape, decode.stored_dtype)
    decode.decode(data, out)
    return out


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(7,), (3, 8, 8), (2, 3, 4, 5)])
def test_arrays_of_any_shape_and_type(dtype, shape):
    values = RNG.integers(0, 200, shape).astype(dtype)
    expect = {"shape": shape, "dtype": dtype, "range": (0, 255)}
    for data in (
        npy(values),
        npy(np.asfortranarray(values)),
        npy(values.astype(values.dtype.newbyteorder(">"))),
    ):
        assert np.array_equal(read_array(data, **expect), values)
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=(2, 0))
    assert np.array_equal(read_array(file.getvalue(), **expect), values)


@pytest.mark.parametrize(
    "value, is_fault",
    [(-1.0, False), (2.0, False), (-1.001, True), (2.001, True), (np.nan, True), (np.inf, True)],
)
def test_values_outside_the_range_are_faults(value, is_fault):
    values = np.zeros((3, 4), np.float32)
    values[1, 2] = value
    expect = {"shape": (3, 4), "dtype": "float32", "range": (-1, 2)}
    if is_fault:
        with pytest.raises(DecodeError, match="range"):
            read_array(npy(values), **expect)
    else:
        assert np.array_equal(read_array(npy(values), **expect), values)


@pytest.mark.parametrize(
    "array, stage",
    [
        (np.zeros((4, 3), np.float32), "shape"),
        (np.zeros((3, 4), np.float64), "dtype"),
        (np.zeros((3, 4), np.int16), "dtype"),
    ],
)
def test_other_arrays_than_declared_are_faults(array, stage):
    with pytest.raises(DecodeError) as caught:
        read_array(npy(array), shape=(3, 4), dtype="float32", range=(0, 1))
    assert caught.value.stage == stage


def test_pickles_are_never_loaded():
    data = npy(np.array([print, {}], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError) as caught:
        read_array(data, shape=(2,), dtype="float32", range=(0, 1))
    assert caught.value.stage == "dtype"


@pytest.mark.parametrize("cut", [0, 3, 40, 128, 175])
def test_truncated_arrays_are_faults(cut):
    data = npy(np.zeros((3, 4), np.float32))
    with pytest.raises(DecodeError):
        read_array(data[:cut], shape=(3, 4), dtype="float32", range=(0, 1))


def test_to_unit_maps_the_range_to_zero_one():
    image = ImageDecode(size=8)
    x = image.event_view(torch.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3).to(torch.uint8))
    unit = image.to_unit(x)
    assert unit.dtype == torch.float32
    assert unit.shape == (2, *image.event_shape)
    assert unit.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(unit, x.float() / 255)
    for dtype in ("uint16", "float16", "float32"):
        array = ArrayDecode(shape=(3,), dtype=dtype, range=(2, 10))
        stored = torch.tensor([[2.0, 6.0, 10.0]]).to(getattr(torch, dtype))
        assert torch.equal(array.to_unit(stored), torch.tensor([[0.0, 0.5, 1.0]]))
        assert array.event_shape == (3,)
    unchanged = torch.tensor([[2.0]])
    ArrayDecode(shape=(1,), range=(2, 10)).to_unit(unchanged)
    assert unchanged.item() == 2


@pytest.mark.parametrize(
    "settings_",
    [
        {"kind": "array", "shape": [3], "dtype": "uint8", "range": [0, 256]},
        {"kind": "array", "shape": [3], "dtype": "float16", "range": [0, 1e6]},
        {"kind": "array", "shape": [3], "dtype": "float32", "range": [1, 1]},
        {"kind": "array", "shape": [], "dtype": "float32", "range": [0, 1]},
        {"kind": "array", "shape": [0], "dtype": "float32", "range": [0, 1]},
        {"kind": "array", "shape": [3], "dtype": "int64", "range": [0, 1]},
        {"kind": "image", "channels": 2},
        {"kind": "image", "suffixes": []},
        {"kind": "image", "suffixes": ["JPG"]},
        {"kind": "image", "size": 0},
    ],
)
def test_impossible_settings_are_refused(settings_):
    with pytest.raises(ValidationError):
        TypeAdapter(Decode).validate_python(settings_)
