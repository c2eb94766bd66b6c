"""Small real shards, written by public libraries (TarWriter, Pillow), and their streams."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.order import Tail
from pipeline.data.settings import DataConfig
from pipeline.data.stream import Stream
from pipeline.data.stream import open_stream as open_checked_stream
from pipeline.data.stream.datasets import DataSets, check_shards, order_of

TINY_COUNTS = (7, 24, 1, 16, 12)  # samples per shard: uneven on purpose, 60 in all


def tiny_image(number: int, size: int = 32) -> np.ndarray:
    """Return RGB [size, size, 3] uint8: a square whose position, size and colour vary."""
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


def pictures_of(path: Path) -> list[bytes]:
    """The PNG files of a shard, read without our own code."""
    contents: list[bytes] = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".png") else None
            contents += [file.read()] if file else []
    return contents


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


def open_stream(
    data: DataConfig,
    *,
    index: Index | Sequence[Index],
    seed: int,
    batch_size: int,
    tail: Tail = "carry",
    states: Sequence[States] | None = None,
    **options,
) -> Stream:
    """Open a stream. states: of the shards; None: check the shards here."""
    indexes = [index] if isinstance(index, Index) else index
    order = order_of(data, indexes, seed, batch_size, tail)
    seen = check_shards(data, indexes) if states is None else states
    return open_checked_stream(data, indexes, order, seen, **options)


def open_data_sets(data: DataConfig, index: Index, *, seed: int, batch_size: int) -> DataSets:
    """Open what a stream of one data set reads from."""
    order = order_of(data, [index], seed, batch_size)
    return DataSets(data, [index], order, check_shards(data, [index]))
