"""Image files as they occur and as they break, each with the pixels that it must give.

    seed, number -> pixels -> expected (or None: must be refused) -> a file, its surgery, its damage

The truth is there before the file: it comes from the drawn pixels and the format's specification;
where a format loses pixels (JPEG, lossy WebP), from Pillow's reading of the file before the
surgery. `python -m tests.data.awkward_images SEED COUNT FOLDER` writes the files down.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.data.awkward_jpeg import JPEG_KINDS
from tests.data.awkward_others import OTHER_KINDS
from tests.data.awkward_png import PNG_KINDS
from tests.data.image_truth import Bytes

CUT_EVERY = 97
KINDS = (*PNG_KINDS, *JPEG_KINDS, *OTHER_KINDS)
ENDINGS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}


@dataclass(frozen=True)
class AwkwardImage:
    """A file, and what decoding must give: uint8 [height, width, 3], upright, over white."""

    name: str
    content: bytes
    expected: Bytes | None  # None: the file is damaged, and must be refused
    why: str


def make(seed: int, count: int) -> list[AwkwardImage]:
    """Return `count` files, all kinds in turn; number n depends on the seed and n alone."""
    return [_one(seed, number) for number in range(count)]


def _one(seed: int, number: int) -> AwkwardImage:
    kind = KINDS[number % len(KINDS)]
    content, expected, why = kind(np.random.default_rng([seed, number]))
    ending = ENDINGS.get(content[:2], "ppm" if content[:1] == b"P" else "tif")
    name = f"{number:05d}-{kind.__name__.replace('_', '-')}.{ending}"
    return AwkwardImage(name, content, expected, why)


def cuts(content: bytes) -> Iterator[bytes]:
    """Yield the file as it is when it ends at every 97th byte."""
    for end in range(CUT_EVERY, len(content), CUT_EVERY):
        yield content[:end]


def main(seed: int, count: int, folder: Path) -> None:
    """Write the files, and print what each is."""
    folder.mkdir(parents=True)
    print("seed", seed)
    for image in make(seed, count):
        (folder / image.name).write_bytes(image.content)
        print(image.name, "damaged" if image.expected is None else "sound", image.why, sep="\t")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
