"""The interface of sources: settings, and the numbered samples that they open.

settings --`open()`--> Samples: `sizes()` determines, before anything is written, which samples go
         to which shard -> `part(lo, hi)` is sent to a worker process -> `read()` yields its samples

Fields with a description are also arguments of `latentmill pack KIND`; the description is the help
text. A field without a default is a positional argument, any other an option. A function among the
annotations of a field parses the text, and `metavar` names the value.
"""

import io
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.common.component import Component
from pipeline.common.errors import UserError

NO_BOUND = 1 << 40
SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of images: those of `ImageDecode().suffixes`


@dataclass(frozen=True)
class Picture:
    """An encoded picture. It is decoded in full once before it goes into a shard."""

    name: str  # for the list of broken images
    suffix: str
    content: bytes
    resize: int | None  # to this shorter side in pixels; None: copied byte for byte


@dataclass(frozen=True)
class Sample:
    """One sample as it goes into a shard: members by suffix, all of them bytes, and a picture."""

    key: str
    members: Mapping[str, bytes]
    picture: Picture | None = None


@dataclass(frozen=True)
class Broken:
    """A file that is no readable sample: left out of the shards, listed in the report."""

    name: str
    reason: str


class Part(Protocol):
    """A contiguous range of a source; small, and picklable for a worker process."""

    def read(self) -> Iterator[Sample | Broken]:
        """Yield the samples in order, byte for byte the same on every call."""
        ...


class Samples(Protocol):
    """Samples in a fixed order, known before any of them is read."""

    @property
    def ignored(self) -> Mapping[str, int]:
        """Files that are no samples: suffix -> count."""
        ...

    def __len__(self) -> int:
        """Return the number of samples, broken ones included."""
        ...

    def sizes(self) -> Sequence[int]:
        """Return the approximate size of each sample in bytes; determines the shard boundaries."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return a JSON identity of the source: equal identities give equal shards."""
        ...

    def sidecars(self) -> Mapping[str, bytes]:
        """Return further files to write beside the shards, name -> content."""
        ...

    def part(self, lo: int, hi: int) -> Part:
        """Return samples lo..hi-1."""
        ...


class PackSource(Component):
    """The settings of a source."""

    HELP: ClassVar[str]  # a line for `latentmill pack --help`

    kind: str
    # Bounds of a shard.
    shard_bytes: int = NO_BOUND
    shard_samples: int

    @abstractmethod
    def open(self) -> Samples:
        """Find the samples; raises UserError if there are none, or a setting is out of bounds."""

    def check_out(self, out: Path) -> None:
        """Raise UserError if the shards may not be written to the directory `out`."""


def require_positive(**values: int) -> None:
    """Raise UserError naming the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1.")


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey [H, W] or colour [H, W, 3] picture without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
