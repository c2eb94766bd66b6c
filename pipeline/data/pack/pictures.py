"""Images before they are packed: each is decoded once as a check, and resized on request."""

import io

import numpy as np
from PIL import Image

from pipeline.data.decode import DecodeError, ImageDecode
from pipeline.data.decode.codecs import PixelRules, full_scale, read_pixels
from pipeline.data.decode.fault import stable_reason
from pipeline.data.pack.sources.base import Broken, Picture, Sample, encode_png

JPEG_QUALITY = 95  # of resized JPEG images; other formats are saved without loss

_RULES = {
    channels: PixelRules(channels, ImageDecode().background, ImageDecode().max_pixels)
    for channels in (1, 3)
}


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
        return Broken(picture.name, stable_reason(error))
    return Sample(sample.key, {suffix: content, **sample.members})


def _prepare(picture: Picture) -> tuple[str, bytes]:
    """Return suffix and bytes; a picture that is not larger than `resize` stays as it is."""
    pixels = read_pixels(picture.content, _RULES[3], full_scale)
    if picture.resize is None or min(pixels.shape[:2]) <= picture.resize:
        return picture.suffix, picture.content
    if _is_grey(picture.content):
        pixels = read_pixels(picture.content, _RULES[1], full_scale)[:, :, 0]
    return _shrink(Image.fromarray(pixels), picture.suffix, picture.resize)


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
