"""Awkward image files: what every viewer shows is decoded, what is damaged is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline.data.decode import DecodeError, ImageDecode
from pipeline.data.decode.codecs import PixelRules, full_scale, read_pixels
from tests.data.awkward_images import CUT_EVERY, cuts, make
from tests.data.awkward_jpeg import (
    ARITHMETIC,
    EXIF_MARK,
    ODD_SAMPLING,
    XMP_MARK,
    profile,
    segment,
    segments,
)
from tests.data.awkward_png import chunk, png_file
from tests.data.image_truth import (
    UNLIKE_PILLOW,
    by_pillow,
    exif,
    over_white,
    saved,
    smooth,
    turned,
    xmp,
)

SEED = 16
RULES = PixelRules(channels=3, background=255, max_pixels=1 << 26)
OTHER_RULES = [PixelRules(1, 255, 1 << 26), PixelRules(4, 255, 1 << 26)] + [
    PixelRules(channels, 255, 1 << 26, is_deep=True) for channels in (1, 3, 4)
]


def read(content, rules=RULES):
    return read_pixels(content, rules, full_scale)


def distance(found, expected):
    assert found.shape == expected.shape
    return np.abs(found.astype(int) - expected).max()


def pillow_shows(content):
    """Pillow's pixels of a file, upright, over white; None where it refuses the file."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, (255,) * 4)
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except Exception:  # noqa: BLE001
        return None


@pytest.mark.parametrize("part", range(4))
def test_every_file_gives_its_pixels_or_is_refused(part):
    print("seed", SEED + part)
    for image in make(SEED + part, 105):
        if image.expected is None:
            for rules in (RULES, *OTHER_RULES):
                with pytest.raises(DecodeError):
                    pytest.fail(f"{image.name}, {image.why}: {read(image.content, rules).shape}")
            continue
        try:
            found = read(image.content)
        except DecodeError as error:
            pytest.fail(f"{image.name}, {image.why}: {error}")
        assert distance(found, image.expected) <= 2, (image.name, image.why)
        shown = pillow_shows(image.content)
        if shown is not None and UNLIKE_PILLOW not in image.why:
            assert distance(found, shown) <= 2, (image.name, image.why)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("PPM", {}),
    ],
)
def test_a_file_that_ends_at_any_97th_byte_is_refused(kind, options):
    content = saved(smooth(np.random.default_rng(SEED), least=40), kind, **options)
    assert len(content) > 3 * CUT_EVERY
    for part in cuts(content):
        with pytest.raises(DecodeError):
            pytest.fail(f"{len(part)} of {len(content)} bytes: {read(part).shape}")


def decoded(content, side, **settings):
    decode = ImageDecode(size=side, **settings)
    out = np.zeros(decode.buffer_shape, decode.stored_dtype)
    decode.decode(content, out)
    return out


def half_white(**options):
    """Left half white: a turn is seen by eye."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48] = 255
    return saved(pixels, "JPEG", **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", ["first", "before SOF", "before SOS"])
@pytest.mark.parametrize("around", ["XMP", "profile", "nothing"])
def test_exif_late_is_heeded_wherever_its_segment_stands(orientation, place, around):
    content = half_white()
    head, scan = segments(content)
    at = {
        "first": 0,
        "before SOF": next(i for i, it in enumerate(head) if it[1] == 0xC0),
        "before SOS": len(head),
    }[place]
    before = {
        "XMP": [segment(0xE1, XMP_MARK + b" " * 300)],
        "profile": profile(np.random.default_rng(0)),
        "nothing": [],
    }[around]
    head[at:at] = [*before, segment(0xE1, EXIF_MARK + exif(orientation))]
    content = b"\xff\xd8" + b"".join(head) + scan
    expected = turned(by_pillow(half_white()), orientation)
    assert distance(read(content), expected) <= 2
    side = 64
    square = expected[(expected.shape[0] - side) // 2 :, (expected.shape[1] - side) // 2 :][
        :side, :side
    ]
    assert distance(decoded(content, side), square) <= 2


def test_xmp_orientation_reaches_an_image_of_exactly_the_slots_size():
    """The decoder's fast path looks at such files, too."""
    content = saved(smooth(np.random.default_rng(1), least=48)[:40, :40], "JPEG")
    head, scan = segments(content)
    head.append(segment(0xE1, XMP_MARK + xmp(3)))
    found = decoded(b"\xff\xd8" + b"".join(head) + scan, 40)
    assert distance(found, turned(by_pillow(content), 3)) <= 2


def odd_headers():
    """phone/se0 and its siblings: name -> a JPEG that viewers show, and libjpeg warns about."""
    plain = saved(smooth(np.random.default_rng(2), least=40)[:40, :40], "JPEG")
    head, scan = segments(plain)

    def joined(*parts):
        return b"\xff\xd8" + b"".join(parts)

    no_end = scan[: scan[3]] + b"\0" + scan[scan[3] + 1 :]
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\x07")
    return plain, {
        "Se = 0": joined(*head, no_end),
        "JFIF 2.01": joined(head[0][:9] + b"\2" + head[0][10:], *head[1:], scan),
        "fill bytes": joined(head[0], b"\xff" * 5, *head[1:], b"\xff\xff", scan),
        "bytes before a marker": joined(head[0], b"abc\0", *head[1:], b"\xff\0x", scan),
        "unknown transform": joined(adobe, *head[1:], scan),
        "no segment of its own": joined(*head[1:], scan),
        "bad profile": joined(*head, segment(0xE2, b"ICC_PROFILE\0\5\2a"), scan),
        "a short length": joined(*head, b"\xff\xe7\0\0", scan),
        "zeros behind the scan": plain[:-2] + bytes(9) + plain[-2:],
        "zeros, then fill bytes": plain[:-2] + bytes(9) + b"\xff" * 5 + plain[-2:],
        "a second image": plain + plain[:300],
        "all at once": joined(head[0], b"ab", adobe, b"cd", *head[1:], b"\0", no_end[:-2])
        + bytes(9)
        + plain[-2:],
    }


PLAIN, ODD = odd_headers()


@pytest.mark.parametrize("name", ODD)
def test_phone_se0_and_other_odd_headers_lose_no_pixel(name):
    for channels, colours in ((1, "GRAY"), (3, "RGB"), (4, "RGBA")):
        expected = simplejpeg.decode_jpeg(PLAIN, colours)
        assert np.array_equal(decoded(ODD[name], 40, channels=channels), expected)


def test_an_odd_header_hides_no_damage():
    """The header is mended; a scan that lost data stays an error."""
    content = saved(
        smooth(np.random.default_rng(3), least=40), "JPEG", restart_marker_blocks=1, quality=90
    )
    head, scan = segments(content)
    odd = b"\xff\xd8" + b"".join((head[0], b"abc", *head[1:])) + scan[: scan[3]] + b"\0"
    rest = scan[scan[3] + 1 :]
    assert distance(read(odd + rest), by_pillow(content)) <= 2
    first = rest.find(b"\xff\xd0")
    broken = {
        "Premature end": rest[:-2],
        "instead of RST0": rest[:first] + b"\xff\xd5" + rest[first + 2 :],
        "premature end of data segment": rest[: first + 2] + rest[rest.find(b"\xff\xd1") :],
    }
    for reason, scan_of in broken.items():
        with pytest.raises(DecodeError, match=reason):
            read(odd + scan_of)


def test_a_tail_of_erased_flash_memory_is_refused_soon():
    """A damaged card gives back 0xFF, which a search for markers must not meet again and again."""
    for kept in (PLAIN[:20], PLAIN[:-300], PLAIN[:-20]):
        with pytest.raises(DecodeError):
            read(kept + b"\xff" * 1_000_000)  # hours, if it took quadratic time


def png_of(values, colour_type, *extra):
    height, width, _ = values.shape
    depth = values.dtype.itemsize * 8
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    big = values.astype(values.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big)
    return [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows))]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("stored", [1, 2, 3, 4])
@pytest.mark.parametrize("stored_type", [np.uint8, np.uint16])
def test_damaged_png_is_refused_whichever_library_decodes(channels, dtype, stored, stored_type):
    """Pixels stored without compression: a flipped bit is a valid stream of other pixels."""
    values = np.random.default_rng(1).integers(0, 30, (16, 16, stored)).astype(stored_type)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[stored]
    content = png_file([*png_of(values, colour_type), chunk(b"IEND", b"")])
    decoded(content, 16, channels=channels, dtype=dtype)
    start = content.find(b"IDAT")
    for place in range(start, len(content) - 12, 97):
        damaged = bytearray(content)
        damaged[place] ^= 16
        with pytest.raises(DecodeError, match="PNG: chunk"):
            decoded(bytes(damaged), 16, channels=channels, dtype=dtype)


@pytest.mark.parametrize("name", ["IHDR", "PLTE", "tRNS", "eXIf", "iTXt", "IDAT"])
def test_the_damaged_chunk_is_named(name):
    values = np.zeros((8, 8, 1), np.uint8)
    header, pixels = png_of(values, 3)
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)
    extra = [
        chunk(b"PLTE", bytes(768)),
        chunk(b"tRNS", bytes(range(256))),
        chunk(b"eXIf", exif(6)),
        chunk(b"iTXt", text),
    ]
    content = bytearray(png_file([header, *extra, pixels, chunk(b"IEND", b"")]))
    read(bytes(content))
    content[content.find(name.encode()) + 25 * (name == "iTXt") + 5] ^= 1
    with pytest.raises(DecodeError, match=f"PNG: chunk '{name}' is damaged"):
        read(bytes(content))


@pytest.mark.parametrize("colour_type", [0, 2])
def test_sixteen_bit_transparency_is_compared_with_both_bytes(colour_type):
    """By the specification; Pillow and OpenCV each lose a part of it."""
    values = np.random.default_rng(5).integers(0, 65536, (12, 12, colour_type + 1))
    values = values.astype(np.uint16)
    key = values[3, 4]
    values[5, 5] = key ^ 1  # differs in the low byte alone
    alpha = np.where((values == key).all(axis=2), 0, 255)
    parts = png_of(values, colour_type, chunk(b"tRNS", key.astype(">u2").tobytes()))
    content = png_file([*parts, chunk(b"IEND", b"")])
    colour = np.broadcast_to(values >> 8, (12, 12, 3))
    assert np.array_equal(read(content), over_white(colour, alpha))
    with_alpha = read(content, OTHER_RULES[1])
    assert np.array_equal(with_alpha, np.dstack([colour, alpha]))
    deep = read(content, PixelRules(4, 255, 1 << 26, is_deep=True))
    assert np.array_equal(deep[..., 3], alpha * 257)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]


@pytest.mark.parametrize("mode", [*MODES, "LAB"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_mode_of_pillow_that_has_a_range(mode, channels):
    pixels = smooth(np.random.default_rng(6), 4)
    colour = Image.fromarray(pixels[..., :3].copy())
    if mode == "LAB":
        image = Image.merge("LAB", colour.split())
    elif mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = Image.fromarray(pixels)
        image = image.convert("LA") if mode == "La" else image
        image = image.convert(mode)
    else:
        image = colour.convert(mode)
    side = (image.height, image.width)
    decode = ImageDecode(size=side, channels=channels)
    found = np.zeros(decode.buffer_shape, np.uint8)
    decode.decode_image(image, found)
    expected = image.convert("LA") if mode == "La" else image
    if mode == "LAB":
        expected = image.convert("RGB")
    if image.has_transparency_data and channels != 4:
        white = Image.new("RGBA", image.size, (255,) * 4)
        expected = Image.alpha_composite(white, expected.convert("RGBA"))
    expected = np.asarray(expected.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    assert distance(found, expected.reshape(found.shape)) <= 2


def test_modes_without_a_range_are_refused_and_transparent_greys_kept():
    decode = ImageDecode(size=8)
    out = np.zeros(decode.buffer_shape, np.uint8)
    for mode in ("I", "F"):
        with pytest.raises(DecodeError, match=f"mode {mode} have no declared range"):
            decode.decode_image(Image.new(mode, (8, 8)), out)
    grey = Image.fromarray(np.full((8, 8), 0x1234, np.uint16))
    decode.decode_image(grey, out)
    assert (out == 0x12).all()
    grey.info["transparency"] = 0x1234
    decode.decode_image(grey, out)
    assert (out == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_unreadable_exif_counts_as_none_in_every_format(kind):
    pixels = smooth(np.random.default_rng(7))
    content = saved(pixels, kind, exif=b"Exif\0\0garbage that is no TIFF header")
    assert distance(read(content), by_pillow(content)) <= 2


def kinds_of_jpeg():
    pixels = smooth(np.random.default_rng(8), least=40)
    cmyk = saved(pixels, "JPEG", as_mode="CMYK")
    transform = cmyk.find(b"Adobe") + 11
    progressive = saved(pixels, "JPEG", progressive=True)
    return {
        "grey": saved(pixels[..., :1], "JPEG"),
        "CMYK": cmyk,
        "YCCK": cmyk[:transform] + b"\2" + cmyk[transform + 1 :],
        "progressive": progressive,
        "4:4:0": simplejpeg.encode_jpeg(pixels, colorsubsampling="440"),
        "4:1:1": simplejpeg.encode_jpeg(pixels, colorsubsampling="411"),
        "arithmetic": ARITHMETIC,
        "odd sampling": ODD_SAMPLING,
        "a second image behind the first, as in MPO": progressive + cmyk,
    }


@pytest.mark.parametrize("kind", kinds_of_jpeg())
def test_every_kind_of_jpeg_is_as_pillow_shows_it(kind):
    content = kinds_of_jpeg()[kind]
    assert distance(read(content), by_pillow(content)) <= 2
    with pytest.raises(DecodeError):
        read(content[: len(content) // 3])
