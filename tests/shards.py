"""Small real shards, written as anyone would: webdataset's TarWriter and Pillow."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

TINY_COUNTS = (7, 24, 1, 16, 12)  # samples per shard: uneven on purpose, 60 in all


def tiny_image(number: int, size: int = 32) -> np.ndarray:
    """RGB [size, size, 3] uint8: a coloured square whose place, size and colour follow `number`."""
    rng = np.random.Generator(np.random.Philox(key=number))
    image = np.full((size, size, 3), rng.integers(0, 60, 3), np.uint8)
    x, y = rng.integers(0, size // 2, 2)
    side = int(rng.integers(4, size // 2))
    image[y : y + side, x : x + side] = rng.integers(100, 256, 3)
    return image


def png(image: np.ndarray) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_tiny_shards(folder: Path, counts: Iterable[int] = TINY_COUNTS) -> None:
    """Write tiny-0000.tar ...: per sample a PNG, a class of three (`.cls`) and a JSON record."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with TarWriter(str(folder / f"tiny-{shard:04d}.tar"), mtime=0) as tar:
            for _ in range(count):
                tar.write(
                    {
                        "__key__": f"{number:06d}",
                        "png": png(tiny_image(number)),
                        "cls": number % 3,
                        "json": {"number": number, "group": f"g{number // 4}"},
                    }
                )
                number += 1
