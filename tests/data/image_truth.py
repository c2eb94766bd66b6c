"""What tests of decoding know without the decoder: orientations, alpha, metadata, plain files."""

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
Random = np.random.Generator
Made = tuple[bytes, Bytes | None, str]  # content, expected pixels (None: damaged), why

UNLIKE_PILLOW = "unlike Pillow"  # in `why`: Pillow shows other pixels, or damage as if it were none


def turned(pixels: Bytes, orientation: int) -> Bytes:
    """Return what a viewer shows of stored pixels (CIPA DC-008, tag 0x0112)."""
    return {
        2: lambda: pixels[:, ::-1],
        3: lambda: pixels[::-1, ::-1],
        4: lambda: pixels[::-1],
        5: lambda: pixels.swapaxes(0, 1),
        6: lambda: np.rot90(pixels, -1),
        7: lambda: np.rot90(pixels, 2).swapaxes(0, 1),
        8: lambda: np.rot90(pixels, 1),
    }.get(orientation, lambda: pixels)()


def exif(orientation: int, endian: str = ">") -> bytes:
    """A block of Exif: a TIFF header and one directory, with another tag before the orientation."""
    mark = b"MM" if endian == ">" else b"II"
    tags = struct.pack(f"{endian}HHII", 0x0100, 3, 1, 7 << (16 if endian == ">" else 0))
    if orientation:
        tags += struct.pack(f"{endian}HHIHH", 0x0112, 3, 1, orientation, 0)
    header = mark + struct.pack(f"{endian}HIH", 42, 8, len(tags) // 12)
    return header + tags + bytes(4)


def xmp(orientation: int, is_element: bool = False) -> bytes:
    """XMP that says an orientation, in either of its two ways."""
    if is_element:
        return b"<x><tiff:Orientation>%d</tiff:Orientation></x>" % orientation
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def smooth(rng: Random, channels: int = 3, least: int = 9) -> Bytes:
    """Smooth pixels of a random size, [height, width, channels]."""
    height, width = (int(side) for side in rng.integers(least, 49, 2))
    coarse = rng.integers(0, 256, (4, 4, channels)).astype(np.uint8)
    planes = [Image.fromarray(coarse[:, :, c].copy()) for c in range(channels)]
    return np.stack([np.asarray(plane.resize((width, height))) for plane in planes], axis=2)


def over_white(colour: NDArray[np.integer], alpha: NDArray[np.integer]) -> Bytes:
    """Lay colours of alpha 0 to 255 over white."""
    share = alpha[:, :, np.newaxis] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def saved(pixels: Bytes, kind: str, as_mode: str | None = None, **options: object) -> bytes:
    """Encode pixels [height, width, 1 | 3 | 4] by Pillow."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image = image.convert(as_mode) if as_mode else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(content: bytes) -> Bytes:
    """Pillow's pixels in colour."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))
