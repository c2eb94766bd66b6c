"""Images before they are packed: each is decoded once as a check, and resized on request.

What is resized keeps its kind: grey, colour, alpha, 8 or 16 bits.
"""

import io
import math

import cv2
import numpy as np
from PIL import Image

from pipeline.data.decode import DecodeError, ImageDecode
from pipeline.data.decode.codecs import PixelRules, full_scale, read_pixels, rules_to_keep
from pipeline.data.decode.pixels import Pixels, resized
from pipeline.data.pack.sources.base import Broken, Picture, Sample, encode_png

JPEG_QUALITY = 95  # of resized JPEG images; other formats are saved without loss

MAX_PIXELS = "--max-pixels"  # what the reasons in broken.jsonl call the bound
# A JPEG above the bound is scaled down while it is decoded, but stays so many times as large as
# wanted: by the antialiased resize few pixels then differ by more than 2 levels of 255.
SPARE = 2
DECODERS_SCALES = (1, 2, 4, 8)  # to one n-th: libjpeg's others move the picture by parts of a pixel


def prepared(sample: Sample) -> Sample | Broken:
    """Return a sample with its picture, if it has one, among its members.

    The picture is decoded in full by the decoders of the stream; one that cannot be decoded is
    broken.
    """
    picture = sample.picture
    if picture is None:
        return sample
    try:
        suffix, content = _prepare(picture)
    except DecodeError as error:
        return Broken(picture.name, str(error))
    return Sample(sample.key, {suffix: content, **sample.members})


def _prepare(picture: Picture) -> tuple[str, bytes]:
    """Return suffix and bytes; a picture that is not larger than `resize` stays as it is."""
    side = picture.resize
    rules = PixelRules(
        channels=3,
        background=ImageDecode().background,
        max_pixels=picture.max_pixels,
        max_pixels_setting=MAX_PIXELS,
        counts_scaled=side is not None,
    )
    if side is None:
        read_pixels(picture.content, rules, full_scale)
        return picture.suffix, picture.content
    sizes: list[tuple[int, int]] = []

    def scale_of(height: int, width: int) -> float:
        sizes.append((height, width))
        return 1 / _reduction(height, width, side, rules.max_pixels)

    pixels = read_pixels(picture.content, rules, scale_of)
    height, width = sizes[0] if sizes else pixels.shape[:2]
    if min(height, width) <= side:
        return picture.suffix, picture.content
    kept = rules_to_keep(picture.content, rules)
    if kept != rules:
        pixels = read_pixels(picture.content, kept, scale_of)
    return _shrink(pixels, picture.suffix, side, height, width)


def _reduction(height: int, width: int, side: int, max_pixels: int) -> int:
    """How many times smaller a JPEG is decoded: as little as the bound demands."""
    reduction = 1
    for following in DECODERS_SCALES[1:]:
        pixels = math.ceil(height / reduction) * math.ceil(width / reduction)
        if pixels <= max_pixels or min(height, width) < following * SPARE * side:
            break
        reduction = following
    return reduction


def _shrink(pixels: Pixels, suffix: str, side: int, height: int, width: int) -> tuple[str, bytes]:
    """Scale the shorter side to `side`; JPEG stays JPEG, all else becomes PNG.

    height, width: of the file's image, of which `pixels` are all, or one in n by n.
    """
    channels = pixels.shape[2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    reduction = round(height / pixels.shape[0])
    box = (0, 0, width / reduction, height / reduction)
    pixels = resized(pixels, size, Image.Resampling.LANCZOS, box)
    if pixels.dtype == np.uint16:
        return "png", _encode_deep_png(pixels)
    shown = (pixels[:, :, 0] if channels == 1 else pixels).astype(np.uint8, copy=False)
    if suffix not in ("jpg", "jpeg"):
        return "png", encode_png(shown)
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return suffix, buffer.getvalue()


def _encode_deep_png(pixels: Pixels) -> bytes:
    """Encode 16-bit pixels by OpenCV: Pillow writes grey ones only."""
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]  # OpenCV's
    return cv2.imencode(".png", pixels[:, :, order])[1].tobytes()
