"""Encoded pictures: full decoding, shrinking, and lossless encoding for the sources."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = ("jpeg", "jpg", "png", "webp")  # the formats that the stream decodes
JPEG_QUALITY = 95  # of pictures that `resize` makes smaller; other formats are saved without loss


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey [H, W] or colour [H, W, 3] picture without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def damage_reason(error: Exception) -> str:
    """Say what is wrong with a picture, the same text on every run."""
    if isinstance(error, UnidentifiedImageError):  # its text holds a memory address
        return "not an image, or of an unknown format"
    return f"{type(error).__name__}: {error}"


def prepare_image(suffix: str, data: bytes, resize: int | None) -> tuple[str, bytes]:
    """Decode a picture in full and return its suffix and bytes, made smaller if `resize` asks.

    `resize` is the shorter side in pixels; a picture that is not larger stays as it is. Raises
    whatever the decoder raises on damaged data; a picture of absurd size counts as damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on metadata; damage raises
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
        image.load()
        if resize is None or min(image.size) <= resize:
            return suffix, data
        return _shrink(image, suffix, resize)


def _shrink(image: Image.Image, suffix: str, side: int) -> tuple[str, bytes]:
    """Scale the shorter side to `side`, upright (the new file carries no orientation tag)."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of more than 8 bits (mode {image.mode}) cannot be resized")
    grey = image.mode in ("1", "L", "LA")
    image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if suffix in ("jpg", "jpeg"):
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return suffix, buffer.getvalue()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()
