"""What sources know of image files; decoding is left to `pack.pictures`: a source is light."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = ("jpg", "jpeg", "png", "webp")  # what the stream looks for: `ImageDecode().suffixes`


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey [H, W] or colour [H, W, 3] picture without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
