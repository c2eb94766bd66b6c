"""Image files to pixels: bounds first, then the fastest decoder that is exact for the file.

    bytes -> format and size from the header -> size bound -> simplejpeg | OpenCV | Pillow
          -> uint8 [height, width, channels]

JPEG goes through libjpeg-turbo, plain PNG (8 bit, no alpha) and plain lossy WebP through OpenCV
(2 to 4 times faster than Pillow, equal bits, and they release the GIL), all else through Pillow.
"""

import io
import math
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.decode.fault import Content, DecodeError

Pixels = NDArray[np.uint8]
# (height, width) of the upright image in its file -> the smallest scale that is still enough.
ScaleOf = Callable[[int, int], float]

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Pillow reads these without starting a program (its EPS plug-in would start Ghostscript).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# PNG chunks before the pixels that change what a viewer shows: alpha, orientation, animation.
PNG_SPECIAL_CHUNKS = (b"tRNS", b"eXIf", b"acTL")
EXIF_MARK = b"Exif\x00\x00"
EXIF_SEARCH_BYTES = 256
TURNED = (5, 6, 7, 8)  # the Exif orientations that swap height and width


def full_scale(height: int, width: int) -> float:  # noqa: ARG001
    """Want every pixel that the file has."""
    return 1.0


@dataclass(frozen=True)
class PixelRules:
    """What the pixels must become: number of channels, colour under transparency, size bound."""

    channels: int
    background: int
    max_pixels: int


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image whose header declares more pixels than allowed, before any is decoded."""
    if height * width > max_pixels:
        raise DecodeError(
            "size", f"{width} x {height} pixels are more than decode.max_pixels = {max_pixels}"
        )
    if height < 1 or width < 1:
        raise DecodeError("size", f"the header declares {width} x {height} pixels")


def has_exif(data: Content) -> bool:
    """Tell whether a JPEG holds an Exif block where the standard puts it: right at the start, or
    behind the JFIF block (Exif 2.32, section 4.5.4).
    """
    return data.find(EXIF_MARK, 0, EXIF_SEARCH_BYTES) >= 0


def read_pixels(data: Content, rules: PixelRules, scale_of: ScaleOf) -> Pixels:
    """Decode any supported image, upright, as uint8 [height, width, channels].

    A JPEG may come out scaled down by its decoder, to no less than `scale_of` wants. Raises
    DecodeError.
    """
    if data.startswith(JPEG_MAGIC):
        return _read_jpeg(data, rules, scale_of)
    if data.startswith(PNG_MAGIC):
        return _read_png(data, rules)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data, rules)
    return _read_with_pillow(data, rules)


def _read_jpeg(data: Content, rules: PixelRules, scale_of: ScaleOf) -> Pixels:
    try:
        height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
        check_size(height, width, rules.max_pixels)
        orientation = _orientation(data) if has_exif(data) else 1
        is_turned = orientation in TURNED
        scale = scale_of(width, height) if is_turned else scale_of(height, width)
        pixels = simplejpeg.decode_jpeg(
            data,
            "RGB" if rules.channels == 3 else "GRAY",
            # Less a hair: a product that should be whole must not be rounded up.
            min_height=math.ceil(height * scale - 1e-6),
            min_width=math.ceil(width * scale - 1e-6),
        )
    except ValueError as error:
        raise DecodeError("decode", f"JPEG: {error}") from None
    return _upright(pixels, orientation) if orientation != 1 else pixels


def _read_png(data: Content, rules: PixelRules) -> Pixels:
    if len(data) < 33:
        raise DecodeError("decode", f"PNG: only {len(data)} bytes")
    width, height, bit_depth, colour_type = struct.unpack_from(">IIBB", data, 16)
    check_size(height, width, rules.max_pixels)
    head = data[: data.find(b"IDAT") + 1]
    plain = bit_depth == 8 and colour_type == (0 if rules.channels == 1 else 2)
    if not plain or any(chunk in head for chunk in PNG_SPECIAL_CHUNKS):
        return _read_with_pillow(data, rules)
    return _read_with_opencv(data, rules, "PNG")


def _read_webp(data: Content, rules: PixelRules) -> Pixels:
    if len(data) < 30:
        raise DecodeError("decode", f"WebP: only {len(data)} bytes")
    height, width = _webp_size(data)
    check_size(height, width, rules.max_pixels)
    if data[12:16] == b"VP8 " and rules.channels == 3:  # lossy, no alpha, no metadata
        return _read_with_opencv(data, rules, "WebP")
    return _read_with_pillow(data, rules)


def _webp_size(data: Content) -> tuple[int, int]:
    """Height and width from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        return int.from_bytes(data[27:30], "little") + 1, width
    raise DecodeError("decode", f"WebP: unknown first chunk {kind!r}")


def _read_with_opencv(data: Content, rules: PixelRules, name: str) -> Pixels:
    mode = cv2.IMREAD_COLOR_RGB if rules.channels == 3 else cv2.IMREAD_GRAYSCALE
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    except cv2.error as error:
        raise DecodeError("decode", f"{name}: {error.err}") from None
    if pixels is None:
        raise DecodeError("decode", f"{name}: damaged or incomplete")
    return pixels.astype(np.uint8, copy=False).reshape(*pixels.shape[:2], rules.channels)


def _read_with_pillow(data: Content, rules: PixelRules) -> Pixels:
    with _pillow_errors(), Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        return pixels_of(image, rules)


def pixels_of(image: Image.Image, rules: PixelRules) -> Pixels:
    """Return what `read_pixels` would for a lossless file of an image that Pillow holds."""
    with _pillow_errors():
        check_size(image.height, image.width, rules.max_pixels)
        return _converted(ImageOps.exif_transpose(image), rules)


@contextmanager
def _pillow_errors() -> Generator[None]:
    """Raise DecodeError for whatever Pillow raises."""
    try:
        yield
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError("size", str(error)) from None
    except Exception as error:  # noqa: BLE001
        # Pillow's plug-ins raise whatever their parsers meet (struct.error, SyntaxError, ...), and
        # every one of them means the same here: this file is no image that we can read.
        raise DecodeError("decode", f"{type(error).__name__}: {error}") from None


def _converted(image: Image.Image, rules: PixelRules) -> Pixels:
    if image.mode.startswith("I;16"):  # 16-bit grey: the high byte, as every PNG reader does
        high = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        image = Image.fromarray(high)
    if image.mode in ("I", "F"):
        raise DecodeError("decode", f"pixels of mode {image.mode} have no declared range")
    if image.has_transparency_data:
        image = _flattened(image, rules.background)
    pixels = np.asarray(image.convert("RGB" if rules.channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], rules.channels)


def _flattened(image: Image.Image, background: int) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA"))


def _orientation(data: Content) -> int:
    """The Exif orientation, 1 to 8; an unreadable Exif block counts as none."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return int(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an Exif orientation (tag 0x0112, CIPA DC-008): mirror and turn the stored pixels."""
    if orientation in TURNED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
