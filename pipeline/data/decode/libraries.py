"""OpenCV and Pillow: the pixels of a file whose container is known to be whole.

    bytes -> size bound -> OpenCV | Pillow -> uint8 or uint16 [height, width, channels]

OpenCV is 2 to 4 times faster than Pillow with equal bits, and releases the GIL; Pillow reads all.
"""

import io
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.decode.fault import Content, DecodeError
from pipeline.data.decode.orientation import orientation_of, upright
from pipeline.data.decode.pixels import Deep, Pixels, cleared, converted, widened

# Pillow reads these without starting a program (its EPS plug-in would start Ghostscript).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PILLOW_MAX_PIXELS = 178_956_970  # it opens no larger image
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # its name of so many channels
OPENCV_MODES = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB, 4: cv2.IMREAD_UNCHANGED}


@dataclass(frozen=True)
class PixelRules:
    """What the pixels must become."""

    channels: int  # 1: grey; 3: colour; 4: colour and alpha
    background: int  # grey level of 255 behind transparency, unless alpha is kept
    max_pixels: int  # of the file
    is_deep: bool = False  # uint16: both bytes of 16-bit values, 257 times those of 8 bits
    max_pixels_setting: str = "decode.max_pixels"  # what a reason calls the bound
    # The bound counts what a JPEG is scaled down to while it is decoded.
    counts_scaled: bool = False


def check_size(height: int, width: int, rules: PixelRules) -> None:
    """Refuse an image whose header declares more pixels than allowed, before any is decoded."""
    if height * width > rules.max_pixels:
        raise DecodeError(
            "size",
            f"{width} x {height} pixels are more than "
            f"{rules.max_pixels_setting} = {rules.max_pixels}",
        )
    if height < 1 or width < 1:
        raise DecodeError("size", f"the header declares {width} x {height} pixels")


def read_with_opencv(data: Content, rules: PixelRules) -> Pixels:
    """Decode an image of the wanted channels and 8 bits; where OpenCV gives up, Pillow decides."""
    pixels = opencv(data, OPENCV_MODES[rules.channels])
    if pixels is None:
        return read_with_pillow(data, rules)
    return pixels.astype(np.uint8, copy=False).reshape(*pixels.shape[:2], rules.channels)


def opencv(data: Content, mode: int) -> NDArray[Any] | None:
    """Return grey [height, width], or colour and perhaps alpha [height, width, 3 | 4].

    None where the data are damaged.
    """
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    except cv2.error:
        return None
    if pixels is not None and mode == cv2.IMREAD_UNCHANGED and pixels.ndim == 3:
        has_alpha = pixels.shape[2] == 4
        return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if has_alpha else cv2.COLOR_BGR2RGB)
    return pixels


def read_with_pillow(data: Content, rules: PixelRules) -> Pixels:
    """Decode an image of any format and mode."""
    with _pillow_errors(), Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        return pixels_of(image, rules)


def kept_channels(data: Content) -> int:
    """The channels that keep all colours and alpha of a file that Pillow reads."""
    with _pillow_errors(), Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        if image.has_transparency_data:
            return 4
        return 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def pixels_of(image: Image.Image | Pixels, rules: PixelRules) -> Pixels:
    """Return what `read_pixels` would for a lossless file of an image that Pillow holds.

    Or of an array [height, width, 1 | 3 | 4].
    """
    if isinstance(image, np.ndarray):
        check_size(image.shape[0], image.shape[1], rules)
        if image.dtype == np.uint16 and rules.is_deep:
            return converted(image.astype(np.uint16), rules.channels, rules.background)
        image = _eight_bits(image)
    with _pillow_errors():
        check_size(image.height, image.width, rules)
        image.load()
        pixels = upright(_converted(image, rules), orientation_of(image))
    return widened(pixels) if rules.is_deep else pixels


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
        # Pillow's plug-ins raise many kinds of errors (struct.error, SyntaxError, ...). All of
        # them mean that this file cannot be read as an image.
        raise DecodeError("decode", f"{type(error).__name__}: {error}") from None


def _converted(image: Image.Image, rules: PixelRules) -> Pixels:
    values = _sixteen_bits(image)
    if values is not None:
        if rules.is_deep:
            return converted(values, rules.channels, rules.background)
        image = _eight_bits(values)
    if image.mode in ("I", "F"):
        raise DecodeError("decode", f"pixels of mode {image.mode} have no declared range")
    if image.mode in _VIA:
        image = image.convert(_VIA[image.mode])
    if image.has_transparency_data and rules.channels != 4:
        image = _flattened(image, rules.background)
    pixels = np.asarray(image.convert(PILLOW_MODES[rules.channels]))
    return pixels.reshape(*pixels.shape[:2], rules.channels)


# Modes from which Pillow converts to one other mode only.
_VIA = {"LAB": "RGB", "La": "LA"}


def _sixteen_bits(image: Image.Image) -> Deep | None:
    """The values of 16-bit grey [height, width, 1], or 4 channels where one value is transparent.

    Else None.
    """
    # Pillow holds PGM files of 16 bits in mode I; their range is declared, though.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):
        return None
    values = np.asarray(image).astype(np.uint16)[:, :, np.newaxis]
    clear = image.info.get("transparency")
    return values if clear is None else cleared(values, clear)


def _eight_bits(values: Pixels) -> Image.Image:
    """An array as an image; of 16 bits the high byte, as every PNG reader does."""
    levels = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


def _flattened(image: Image.Image, background: int) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA"))
