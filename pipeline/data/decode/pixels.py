"""Pixels in arrays [height, width, channels] of uint8 or uint16.

8 bits --widened--> 16 bits --converted--> other channels; both --resized--> any size

Pillow can neither convert nor resize colours of 16 bits, so that is done here.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Deep = NDArray[np.uint16]
Pixels = NDArray[np.uint8] | Deep

MAX = 65535
PER_BYTE = 257  # 65535 / 255: black stays black, and white white


def widened(pixels: Pixels) -> Deep:
    """Return 8-bit pixels times 257; 16-bit ones as they are."""
    deep = pixels.astype(np.uint16, copy=False)
    return deep if pixels.dtype == np.uint16 else deep * np.uint16(PER_BYTE)


def cleared(grey: Deep, clear: int) -> Deep:
    """Return grey [height, width, 1] as colour and alpha; its value `clear` is transparent."""
    alpha = np.where(grey == clear, np.uint16(0), np.uint16(MAX))
    return np.concatenate([grey, grey, grey, alpha], axis=2)


def converted(pixels: Deep, channels: int, background: int) -> Deep:
    """Return grey, colour, or colour and alpha (1, 3, 4 channels) as `channels` of them.

    background: the level of 255 behind transparent pixels, where alpha goes.
    """
    if pixels.shape[2] == 4 and channels != 4:
        colour, alpha = pixels[:, :, :3].astype(np.float32), pixels[:, :, 3:] / np.float32(MAX)
        pixels = _rounded(colour * alpha + background * PER_BYTE * (1 - alpha))
    if channels == 1:
        return _luma(pixels) if pixels.shape[2] == 3 else pixels
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if pixels.shape[2] == 3 and channels == 4:
        opaque = np.full((*pixels.shape[:2], 1), MAX, np.uint16)
        pixels = np.concatenate([pixels, opaque], axis=2)
    return pixels


def resized(
    pixels: Pixels,
    size: tuple[int, int],
    method: Image.Resampling,
    box: tuple[float, float, float, float],
) -> Pixels:
    """Stretch the box (left, top, right, bottom) of the pixels to (width, height) pixels.

    Where there is alpha, colours count by it.
    """
    if pixels.dtype == np.uint16:
        return _resized_deep(pixels.astype(np.float32), size, method, box)
    # Pillow's resize widens its filter when shrinking (no aliasing) and computes in fixed point:
    # the same bits on every CPU.
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return np.asarray(image.resize(size, method, box=box)).reshape(size[1], size[0], channels)


def _resized_deep(
    values: NDArray[np.float32],
    size: tuple[int, int],
    method: Image.Resampling,
    box: tuple[float, float, float, float],
) -> Deep:
    """The same in float32, channel by channel: all that Pillow has for 16 bits."""
    has_alpha = values.shape[2] == 4
    if has_alpha:
        values[:, :, :3] *= values[:, :, 3:] / MAX
    planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(values, 2, 0))
    values = np.stack([np.asarray(plane.resize(size, method, box=box)) for plane in planes], 2)
    if has_alpha:
        alpha = np.rint(values[:, :, 3:]).clip(0, MAX)
        values[:, :, :3] *= np.divide(MAX, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    return _rounded(values)


def _luma(pixels: Deep) -> Deep:
    """Grey by ITU-R 601 from colour, with the integer weights that Pillow uses."""
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), 2, 0)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey.astype(np.uint16)[:, :, np.newaxis]


def _rounded(values: NDArray[Any]) -> Deep:
    return np.rint(values).clip(0, MAX).astype(np.uint16)
