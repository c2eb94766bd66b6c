"""Encoded pictures: full decoding, shrinking, and lossless encoding for the sources."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.decode import ImageDecode
from pipeline.data.decode.codecs import PixelRules, full_scale, read_pixels

SUFFIXES = ImageDecode().suffixes  # what the stream looks for
JPEG_QUALITY = 95  # of pictures that `resize` makes smaller; other formats are saved without loss

_RULES = {
    channels: PixelRules(channels, ImageDecode().background, ImageDecode().max_pixels)
    for channels in (1, 3)
}


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey [H, W] or colour [H, W, 3] picture without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def prepare_image(suffix: str, data: bytes, resize: int | None) -> tuple[str, bytes]:
    """Decode a picture in full and return its suffix and bytes, made smaller if `resize` asks.

    `resize` is the shorter side in pixels; a picture that is not larger stays as it is. The
    decoders are those of the stream, so what passes here will be read there: raises DecodeError on
    whatever they refuse.
    """
    pixels = read_pixels(data, _RULES[3], full_scale)
    if resize is None or min(pixels.shape[:2]) <= resize:
        return suffix, data
    if _is_grey(data):
        pixels = read_pixels(data, _RULES[1], full_scale)[:, :, 0]
    return _shrink(Image.fromarray(pixels), suffix, resize)


def _is_grey(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")


def _shrink(image: Image.Image, suffix: str, side: int) -> tuple[str, bytes]:
    """Scale the shorter side to `side`; JPEG stays JPEG, all else becomes PNG."""
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    if suffix not in ("jpg", "jpeg"):
        return "png", encode_png(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return suffix, buffer.getvalue()
