"""Images: any size and colour in, uint8 [size, size, channels] out.

    file bytes -> pixels (codecs.py) -> central square -> antialiased resize -> slot of the batch

Policies, all fixed and none silent: Exif orientation is applied; transparency is laid over a plain
`background`; grey and colour convert by ITU-R 601 luma; 16-bit values keep their high byte; of an
animation the first frame counts; colour profiles are ignored.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from pipeline.component import Component
from pipeline.data.decode.codecs import (
    JPEG_MAGIC,
    PixelRules,
    has_exif,
    read_pixels,
)

Suffix = Annotated[str, Field(pattern=r"^[^/A-Z]+$")]  # as the index stores them: lower case


class ImageDecode(Component):
    """Decode an image to a square of `size` pixels: shorter side to `size`, centre crop."""

    kind: Literal["image"] = "image"
    size: Annotated[int, Field(ge=1, le=16384)] = 64
    channels: Literal[1, 3] = 3
    suffixes: Annotated[tuple[Suffix, ...], Field(min_length=1)] = ("jpg", "jpeg", "png", "webp")
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    background: Annotated[int, Field(ge=0, le=255)] = 255
    # Pillow itself gives up at 178,956,970 pixels, whatever we ask.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 1 << 26

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one decoded image."""
        return (self.channels, self.size, self.size)

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """(height, width, channels): how one image lies in memory."""
        return (self.size, self.size, self.channels)

    @property
    def stored_dtype(self) -> np.dtype[np.uint8]:
        """The type of the values in the batch."""
        return np.dtype(np.uint8)

    @property
    def member_suffixes(self) -> Sequence[str]:
        """The members that may hold the image, most wanted first."""
        return self.suffixes

    @cached_property
    def _rules(self) -> PixelRules:
        return PixelRules(self.channels, self.background, self.max_pixels)

    def decode(self, data: bytes, out: NDArray[np.uint8]) -> None:
        """Decode one file into `out`, uint8 [size, size, channels]; raise DecodeError."""
        if data.startswith(JPEG_MAGIC) and not has_exif(data):
            # The usual case by one call: a JPEG of the very size goes straight into the slot. A
            # larger one does not fit and fails before decoding; a smaller one shows by its shape.
            try:
                colours = "RGB" if self.channels == 3 else "GRAY"
                if simplejpeg.decode_jpeg(data, colours, buffer=out).shape == out.shape:
                    return
            except ValueError:
                pass  # too large, or damaged: the general way tells which
        self._fit(read_pixels(data, self._rules, self.size), out)

    def _fit(self, pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[top : top + side, left : left + side]
        if side != self.size:
            # Pillow's resize widens its filter when it shrinks (no aliasing) and counts in
            # fixed point: the same bits on every CPU.
            image = Image.fromarray(square if self.channels == 3 else square[:, :, 0])
            method = Image.Resampling[self.resample.upper()]
            resized = np.asarray(image.resize((self.size, self.size), method))
            square = resized.reshape(out.shape)
        out[...] = square

    def event_view(self, x: Tensor) -> Tensor:
        """[b, height, width, channels] as [b, channels, height, width], channels-last memory."""
        return x.permute(0, 3, 1, 2)

    def to_unit(self, x: Tensor) -> Tensor:
        """Map stored values to float32 in [0, 1] on x's device: x / 255."""
        return x.to(torch.float32).div_(255.0)
