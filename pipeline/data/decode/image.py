"""Images: any size and colour in, uint8 or uint16 [height, width, channels] out.

    file bytes -> pixels (codecs.py) -> central part -> antialiased resize -> slot of the batch

Fixed rules: the orientation in Exif, or else in XMP, is applied; transparent pixels are blended
with a plain `background`, unless alpha is one of four channels; grey and colour convert by ITU-R
601 luma; 16-bit values keep their high byte, or both (`dtype: uint16`); the first frame of an
animation is used; colour profiles are ignored.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BeforeValidator, Field
from simplejpeg import decode_jpeg
from torch import Tensor

from pipeline.common.component import Component
from pipeline.data.augmentations import View, ViewOf
from pipeline.data.decode.codecs import read_pixels
from pipeline.data.decode.fault import Content
from pipeline.data.decode.jpeg import COLOURS, JPEG_MAGIC, may_be_turned
from pipeline.data.decode.libraries import PILLOW_MAX_PIXELS, PixelRules, pixels_of
from pipeline.data.decode.pixels import Pixels, resized

MAX_SIDE = 16384

Suffix = Annotated[str, Field(pattern=r"^[^/A-Z]+$")]  # as the index stores them: lower case


def _one_or_two(size: object) -> object:
    """Return pixels of a side as they are, [height, width] as a tuple; equal ones are one side."""
    sides: list[object] = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(s) is int and 1 <= s <= MAX_SIDE for s in sides):
        raise ValueError(f"must be the pixels of a side, or [height, width], of 1 to {MAX_SIDE}")
    return sides[0] if sides[0] == sides[1] else tuple(sides)


Size = Annotated[int | tuple[int, int], BeforeValidator(_one_or_two)]


class ImageDecode(Component):
    """Decode an image to `size`: scale it until it covers that, and cut out the centre."""

    kind: Literal["image"] = "image"
    size: Size = 64  # pixels of a side, or [height, width]
    channels: Literal[1, 3, 4] = 3  # 1: grey; 3: red, green, blue; 4: these and alpha
    # uint16 keeps both bytes of 16-bit PNG files; values of other files are scaled by 257.
    dtype: Annotated[Literal["uint8", "uint16"], Field(exclude_if=lambda it: it == "uint8")] = (
        "uint8"
    )
    # Members that may hold the image, most wanted first.
    suffixes: Annotated[tuple[Suffix, ...], Field(min_length=1)] = ("jpg", "jpeg", "png", "webp")
    # Antialiased; used where the size changes.
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    # Grey level of 255 behind transparency; with 4 channels, of the pictures that are shown.
    background: Annotated[int, Field(ge=0, le=255)] = 255
    # Larger images are bad samples.
    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_MAX_PIXELS)] = 1 << 26

    @cached_property
    def height_and_width(self) -> tuple[int, int]:
        """Pixels of one decoded image."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one decoded image."""
        return (self.channels, *self.height_and_width)

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """(height, width, channels): the shape of one image in memory."""
        return (*self.height_and_width, self.channels)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The type of the values in the batch."""
        return np.dtype(self.dtype)

    @property
    def member_suffixes(self) -> Sequence[str]:
        """The suffixes of members that may hold the image, the preferred one first."""
        return self.suffixes

    @cached_property
    def _colours(self) -> str:
        return COLOURS[self.channels]

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return self.buffer_shape

    @cached_property
    def _is_deep(self) -> bool:
        return self.dtype == "uint16"

    @cached_property
    def _rules(self) -> PixelRules:
        return PixelRules(self.channels, self.background, self.max_pixels, self._is_deep)

    def decode(self, data: Content, out: NDArray[Any]) -> None:
        """Decode one file into `out`, [height, width, channels]; raise DecodeError."""
        if data.startswith(JPEG_MAGIC) and not self._is_deep and not may_be_turned(data):
            # Fast path: a JPEG of exactly this size is decoded straight into the slot. A larger one
            # fails before decoding, a smaller one returns another shape.
            try:
                if decode_jpeg(data, self._colours, buffer=out).shape == self._shape:
                    return
            except ValueError:
                pass  # too large, odd or damaged: the general path tells which
        self._fit(read_pixels(data, self._rules, self._scale_of), out)

    def decode_image(self, image: Image.Image | Pixels, out: NDArray[Any]) -> None:
        """Bring an image, or pixels [height, width, 1 | 3 | 4], into `out`.

        As `decode` does a lossless file of it.
        """
        self._fit(pixels_of(image, self._rules), out)

    def decode_view(self, data: Content, out: NDArray[Any], view_of: ViewOf) -> None:
        """Decode the part of a file that the augmentations choose into `out`, as `decode` does."""
        views: list[tuple[View, int, int]] = []

        def scale_of(height: int, width: int) -> float:
            view = view_of(height, width)
            views.append((view, height, width))
            return self._scale_of(view.height, view.width)

        pixels = read_pixels(data, self._rules, scale_of)
        if not views:  # not a JPEG: decoded as it is
            scale_of(*pixels.shape[:2])
        view, height, width = views[0]
        # The decoder may have scaled the image down.
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        top, left = view.top * down, view.left * across
        # Sums of rounded numbers must not leave the image.
        bottom = min(top + view.height * down, pixels.shape[0])
        right = min(left + view.width * across, pixels.shape[1])
        shown = self._resized(pixels, (left, top, right, bottom))
        out[...] = shown[:, ::-1] if view.is_mirrored else shown

    def _scale_of(self, height: float, width: float) -> float:
        """The smallest scale at which so many pixels still cover the slot, but at most 1."""
        wanted_height, wanted_width = self.height_and_width
        return min(1.0, max(wanted_height / height, wanted_width / width))

    def _fit(self, pixels: Pixels, out: NDArray[Any]) -> None:
        height, width = self.height_and_width
        # The largest part of the slot's proportions; its corner is the whole pixel nearest to where
        # the part would be in the middle, the upper left one of two.
        part_height = min(pixels.shape[0], pixels.shape[1] * height / width)
        part_width = min(pixels.shape[1], pixels.shape[0] * width / height)
        rows, columns = math.ceil(part_height), math.ceil(part_width)
        top = math.ceil((pixels.shape[0] - part_height - 1) / 2)
        left = math.ceil((pixels.shape[1] - part_width - 1) / 2)
        part = pixels[top : top + rows, left : left + columns]
        if (rows, columns) != (height, width):
            part = self._resized(part, (0, 0, part_width, part_height))
        out[...] = part

    def _resized(self, pixels: Pixels, box: tuple[float, float, float, float]) -> Pixels:
        """Stretch the box (left, top, right, bottom) to [height, width, channels]."""
        height, width = self.height_and_width
        return resized(pixels, (width, height), Image.Resampling[self.resample.upper()], box)

    def event_view(self, x: Tensor) -> Tensor:
        """[b, height, width, channels] as [b, channels, height, width], channels-last memory."""
        return x.permute(0, 3, 1, 2)

    def to_unit(self, x: Tensor) -> Tensor:
        """Map stored values to float32 in [0, 1] on x's device: x / 255, or x / 65535."""
        return x.to(torch.float32).div_(65535.0 if self._is_deep else 255.0)
