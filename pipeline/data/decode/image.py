"""Images: any size and colour in, uint8 [size, size, channels] out.

    file bytes -> pixels (codecs.py) -> central square -> antialiased resize -> slot of the batch

Fixed rules: Exif orientation is applied; transparent pixels are blended with a plain `background`;
grey and colour convert by ITU-R 601 luma; 16-bit values keep their high byte; the first frame of an
animation is used; colour profiles are ignored.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from simplejpeg import decode_jpeg
from torch import Tensor

from pipeline.common.component import Component
from pipeline.data.augmentations import View, ViewOf
from pipeline.data.decode.codecs import (
    JPEG_MAGIC,
    PixelRules,
    has_exif,
    pixels_of,
    read_pixels,
)
from pipeline.data.decode.fault import Content

Suffix = Annotated[str, Field(pattern=r"^[^/A-Z]+$")]  # as the index stores them: lower case


class ImageDecode(Component):
    """Decode an image to a square of `size` pixels: shorter side to `size`, centre crop."""

    kind: Literal["image"] = "image"
    size: Annotated[int, Field(ge=1, le=16384)] = 64  # pixels of a side
    channels: Literal[1, 3] = 3  # 1: grey; 3: red, green, blue
    # Members that may hold the image, most wanted first.
    suffixes: Annotated[tuple[Suffix, ...], Field(min_length=1)] = ("jpg", "jpeg", "png", "webp")
    # Antialiased; used where the size changes.
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    background: Annotated[int, Field(ge=0, le=255)] = 255  # grey level behind transparency
    # Larger images are bad samples. Pillow itself gives up at 178,956,970 pixels.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 1 << 26

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one decoded image."""
        return (self.channels, self.size, self.size)

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """(height, width, channels): the shape of one image in memory."""
        return (self.size, self.size, self.channels)

    @property
    def stored_dtype(self) -> np.dtype[np.uint8]:
        """The type of the values in the batch."""
        return np.dtype(np.uint8)

    @property
    def member_suffixes(self) -> Sequence[str]:
        """The suffixes of members that may hold the image, the preferred one first."""
        return self.suffixes

    @cached_property
    def _colours(self) -> str:
        return "RGB" if self.channels == 3 else "GRAY"

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return self.buffer_shape

    @cached_property
    def _rules(self) -> PixelRules:
        return PixelRules(self.channels, self.background, self.max_pixels)

    def decode(self, data: Content, out: NDArray[np.uint8]) -> None:
        """Decode one file into `out`, uint8 [size, size, channels]; raise DecodeError."""
        if data.startswith(JPEG_MAGIC) and not has_exif(data):
            # Fast path: a JPEG of exactly this size is decoded straight into the slot. A larger one
            # fails before decoding, a smaller one returns another shape.
            try:
                if decode_jpeg(data, self._colours, buffer=out).shape == self._shape:
                    return
            except ValueError:
                pass  # too large, or damaged: the general path reports which
        self._fit(read_pixels(data, self._rules, self._scale_of), out)

    def decode_image(self, image: Image.Image, out: NDArray[np.uint8]) -> None:
        """Bring an image that Pillow holds into `out`, as `decode` does a lossless file of it."""
        self._fit(pixels_of(image, self._rules), out)

    def decode_view(self, data: Content, out: NDArray[np.uint8], view_of: ViewOf) -> None:
        """Decode the part of a file that the augmentations choose into `out`, as `decode` does."""
        views: list[tuple[View, int, int]] = []

        def scale_of(height: int, width: int) -> float:
            view = view_of(height, width)
            views.append((view, height, width))
            return min(1.0, max(self.size / view.height, self.size / view.width))

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
        square = self._resized(pixels, (left, top, right, bottom))
        out[...] = square[:, ::-1] if view.is_mirrored else square

    def _scale_of(self, height: int, width: int) -> float:
        return min(1.0, self.size / min(height, width))

    def _fit(self, pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[top : top + side, left : left + side]
        if side != self.size:
            square = self._resized(square, (0, 0, side, side))
        out[...] = square

    def _resized(
        self, pixels: NDArray[np.uint8], box: tuple[float, float, float, float]
    ) -> NDArray[np.uint8]:
        """Stretch the box (left, top, right, bottom) to the square [size, size, channels]."""
        # Pillow's resize widens its filter when shrinking (no aliasing) and computes in fixed
        # point: the same bits on every CPU.
        image = Image.fromarray(pixels if self.channels == 3 else pixels[:, :, 0])
        method = Image.Resampling[self.resample.upper()]
        resized = image.resize((self.size, self.size), method, box=box)
        return np.asarray(resized).reshape(self.buffer_shape)

    def event_view(self, x: Tensor) -> Tensor:
        """[b, height, width, channels] as [b, channels, height, width], channels-last memory."""
        return x.permute(0, 3, 1, 2)

    def to_unit(self, x: Tensor) -> Tensor:
        """Map stored values to float32 in [0, 1] on x's device: x / 255."""
        return x.to(torch.float32).div_(255.0)
