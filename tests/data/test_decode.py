"""The decoding contract: right pixels, documented policies, and DecodeError for all else."""

import io
import json
import math
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

from pipeline.common.errors import UserError
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
    out = np.full(decode.buffer_shape, 77, decode.stored_dtype)
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (48, 31), (5, 90)])
@pytest.mark.parametrize("height, width", [(40, 64), (64, 40), (200, 130), (131, 201), (17, 23)])
def test_any_size_becomes_the_rectangle_in_the_middle(height, width, size, kind):
    """Against Pillow alone: the largest part of the wanted proportions, resized."""
    data = encoded(smooth(height, width), kind, **({"quality": 95} if kind == "JPEG" else {}))
    part = (min(height, width * size[0] / size[1]), min(width, height * size[1] / size[0]))
    rows, columns = (math.ceil(side) for side in part)
    top, left = math.ceil((height - part[0] - 1) / 2), math.ceil((width - part[1] - 1) / 2)
    assert abs(height / 2 - top - part[0] / 2) <= 0.5
    assert abs(width / 2 - left - part[1] / 2) <= 0.5
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop((left, top, left + columns, top + rows))
    box = (0, 0, part[1], part[0])
    expected = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))
    found = decoded(data, size=size)
    assert found.shape == (*size, 3)
    difference = np.abs(found.astype(int) - expected)
    # A JPEG that was scaled down while decoding is cut at other whole pixels.
    assert difference.max() <= (40 if kind == "JPEG" else 0)
    assert difference.mean() < 7
    if (height, width) == size and kind == "JPEG":
        assert np.array_equal(found, simplejpeg.decode_jpeg(data, "RGB"))


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


def test_four_channels_keep_alpha():
    pixels = RNG.integers(0, 256, (40, 56, 4)).astype(np.uint8)
    small = Image.fromarray(pixels).resize((28, 20), Image.Resampling.BICUBIC)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        data = encoded(pixels, kind, **options)
        assert np.array_equal(decoded(data, size=[40, 56], channels=4), pixels)
        assert np.array_equal(decoded(data, size=[20, 28], channels=4), small)
    for stored, kind in ((1, "PNG"), (3, "PNG"), (3, "JPEG"), (1, "JPEG")):
        data = encoded(smooth(32, 32, stored), kind)
        found = decoded(data, size=32, channels=4)
        assert np.array_equal(found[:, :, :3], decoded(data, size=32, channels=3))
        assert (found[:, :, 3] == 255).all()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_png(pixels: np.ndarray, *extra: bytes) -> bytes:
    """A PNG of uint16 [height, width, 1 | 2 | 3 | 4] by its specification, filters unused."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        *extra,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stored", [1, 2, 3, 4])
def test_uint16_keeps_both_bytes(channels, stored):
    """Against the specification's own arithmetic, in float64."""
    pixels = RNG.integers(0, 65536, (24, 32, stored)).astype(np.uint16)
    found = decoded(
        deep_png(pixels), size=[24, 32], channels=channels, dtype="uint16", background=9
    )
    colour = np.broadcast_to(pixels[..., :1], (24, 32, 3)) if stored < 3 else pixels[..., :3]
    alpha = pixels[..., -1:] / 65535 if stored in (2, 4) else np.ones((24, 32, 1))
    if channels == 4:
        expected, tolerance = np.concatenate([colour, alpha * 65535], axis=2), 0
    else:
        expected = colour * alpha + 9 * 257 * (1 - alpha)
        tolerance = 0 if stored in (channels, 1) else 1
        if channels == 1:
            expected = (expected @ [0.299, 0.587, 0.114])[..., np.newaxis]
    assert np.abs(found - expected).max() <= tolerance + 1e-6
    unit = ImageDecode(dtype="uint16").to_unit(torch.from_numpy(found))
    assert torch.equal(unit, torch.from_numpy(found.astype(np.float32)) / 65535)


def test_uint16_of_eight_bits_is_them_times_257():
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(smooth(32, 32), kind)
        found = decoded(data, size=32, dtype="uint16")
        assert np.array_equal(found, decoded(data, size=32).astype(int) * 257)
        # Resized with 16 bits: within the rounding to 8.
        fine, coarse = decoded(data, size=20, dtype="uint16") / 257, decoded(data, size=20)
        assert np.abs(fine - coarse).max() < 1.5


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_uint16_is_resized_as_pillow_resizes_sixteen_bits(resample):
    pixels = RNG.integers(0, 65536, (40, 61, 3)).astype(np.uint16)
    found = decoded(deep_png(pixels), size=[13, 19], dtype="uint16", resample=resample)
    box = (0, 0, 40 * 19 / 13, 40)
    left = math.ceil((61 - box[2] - 1) / 2)
    for channel in range(3):  # of grey Pillow can do it
        plane = Image.fromarray(pixels[:, left : left + math.ceil(box[2]), channel].copy())
        expected = plane.resize((19, 13), Image.Resampling[resample.upper()], box=box)
        assert np.abs(found[:, :, channel] - np.asarray(expected).astype(int)).max() <= 4
    clear = np.concatenate(
        [pixels, np.where(np.arange(61) < 30, 0, 65535)[None, :, None].repeat(40, 0)], 2
    )
    found = decoded(deep_png(clear.astype(np.uint16)), size=20, channels=4, dtype="uint16")
    high = decoded(encoded((clear >> 8).astype(np.uint8), "PNG"), size=20, channels=4)
    seen = high[..., 3] > 128  # colours by their alpha, as Pillow does it with 8 bits
    assert np.abs(found / 257 - high)[seen].max() < 4


def test_sixteen_bit_png_is_turned_and_cleared_as_its_chunks_say():
    pixels = RNG.integers(0, 65536, (8, 8, 1)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = deep_png(pixels, chunk(b"eXIf", exif.tobytes()[6:]))
    settings_ = {"size": 8, "dtype": "uint16"}
    assert np.array_equal(decoded(turned, channels=1, **settings_), np.rot90(pixels, -1))
    for stored in (pixels, pixels.repeat(3, 2)):
        key = stored[2, 3].astype(">u2").tobytes()
        found = decoded(deep_png(stored, chunk(b"tRNS", key)), channels=4, **settings_)
        assert np.array_equal(found[..., :3], pixels.repeat(3, 2))
        assert np.array_equal(found[..., 3:], np.where(pixels == pixels[2, 3], 0, 65535))


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
    "deep": deep_png(smooth(32, 32).astype(np.uint16) * 200),
}
DTYPES = {"deep": "uint16"}


@pytest.mark.parametrize("kind", GOOD)
def test_truncated_images_are_faults(kind):
    data = GOOD[kind]
    for keep in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(DecodeError):
            decoded(data[: int(len(data) * keep)], size=32, dtype=DTYPES.get(kind, "uint8"))


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
        image = decoded(bytes(data), size=32, dtype=DTYPES.get(kind, "uint8"))
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


def test_settings_of_old_look_as_they_did():
    """One number stays one number, and 8 bits are left out: files and fingerprints are the same."""
    dumped = ImageDecode(size=256).model_dump(mode="json")
    assert dumped["size"] == 256
    assert "dtype" not in dumped
    assert ImageDecode(size=[256, 256]) == ImageDecode(size=256)
    new = ImageDecode(size=[256, 384], dtype="uint16", channels=4)
    assert new.event_shape == (4, 256, 384)
    dumped = new.model_dump(mode="json")
    assert (dumped["size"], dumped["dtype"]) == ([256, 384], "uint16")
    text = json.dumps(dumped)
    assert ImageDecode.model_validate_json(text, strict=True) == new


@pytest.mark.parametrize(
    "size", [0, 16385, 2.5, "64", None, True, [1], [256], [1, 2, 3], ["a", 3], [0, 4], []]
)
def test_a_size_is_one_or_two_numbers(size):
    bound = r"size: must be the pixels of a side, or \[height, width\], of 1 to 16384 \(got "
    with pytest.raises(UserError, match=bound):
        ImageDecode(size=size)


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
