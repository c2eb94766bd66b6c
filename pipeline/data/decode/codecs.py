"""Image files to pixels, by their first bytes: JPEG, PNG, WebP, and what Pillow reads else.

    bytes -> format and size from the header -> size bound -> simplejpeg | OpenCV | Pillow
          -> uint8 or uint16 [height, width, channels], upright

JPEG goes through libjpeg-turbo, plain PNG (of the wanted colours) and plain lossy WebP through
OpenCV, 16-bit PNG that is to keep both bytes through OpenCV, too, all else through Pillow.
"""

import struct
from dataclasses import replace

from pipeline.data.decode.fault import Content, DecodeError
from pipeline.data.decode.jpeg import JPEG_MAGIC, ScaleOf, full_scale, is_grey, read_jpeg
from pipeline.data.decode.libraries import (
    PixelRules,
    check_size,
    kept_channels,
    read_with_opencv,
    read_with_pillow,
)
from pipeline.data.decode.pixels import Pixels, widened
from pipeline.data.decode.png import PNG_MAGIC, png_bit_depth, png_channels, read_png

__all__ = ["PixelRules", "full_scale", "read_pixels", "rules_to_keep"]


def read_pixels(data: Content, rules: PixelRules, scale_of: ScaleOf) -> Pixels:
    """Decode any supported image, upright, as uint8 or uint16 [height, width, channels].

    A JPEG may be scaled down by its decoder, but not below what `scale_of` returns. Raises
    DecodeError.
    """
    if data.startswith(JPEG_MAGIC):
        pixels = read_jpeg(data, rules, scale_of)
    elif data.startswith(PNG_MAGIC):
        pixels = read_png(data, rules)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        pixels = _read_webp(data, rules)
    else:
        pixels = read_with_pillow(data, rules)
    return widened(pixels) if rules.is_deep else pixels


def rules_to_keep(data: Content, rules: PixelRules) -> PixelRules:
    """Return the rules that keep the channels and bits of a file; it was read before."""
    if data.startswith(JPEG_MAGIC):
        return replace(rules, channels=1 if is_grey(data) else 3)
    if data.startswith(PNG_MAGIC):
        return replace(rules, channels=png_channels(data), is_deep=png_bit_depth(data) == 16)
    return replace(rules, channels=kept_channels(data))


def _read_webp(data: Content, rules: PixelRules) -> Pixels:
    if len(data) < 30:
        raise DecodeError("decode", f"WebP: only {len(data)} bytes")
    height, width = _webp_size(data)
    check_size(height, width, rules)
    if data[12:16] == b"VP8 " and rules.channels == 3:  # lossy, no alpha, no metadata
        return read_with_opencv(data, rules)
    return read_with_pillow(data, rules)


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
