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
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from pipeline.common.arguments import size
from pipeline.common.component import Component
from pipeline.common.errors import UserError

NO_BOUND = 1 << 40
# As `ImageDecode` has them, which is not loaded for the help.
SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 1 << 26
PILLOW_MAX_PIXELS = 178_956_970


@dataclass(frozen=True)
class Picture:
    """An encoded picture. It is decoded in full once before it goes into a shard."""

    name: str  # for the list of broken images
    suffix: str
    content: bytes
    resize: int | None  # to this shorter side in pixels; None: copied byte for byte
    # Above it a picture is broken; with `resize` it counts a JPEG as scaled while it is decoded.
    max_pixels: int = MAX_PIXELS


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
    MAX_SHARD_SAMPLES: ClassVar[int] = 10_000  # unless `shard_samples` says otherwise

    shard_bytes: int = NO_BOUND  # of a shard at most
    shard_samples: int | None = Field(
        default=None, description="at most (what gives 16 shards or more)"
    )

    @abstractmethod
    def open(self) -> Samples:
        """Find the samples; raises UserError if there are none, or a setting is out of bounds."""

    def check_out(self, out: Path) -> None:
        """Raise UserError if the shards may not be written to the directory `out`."""


class PictureSource(PackSource):
    """The settings of a source whose pictures are files, or were.

    resize: shorter side in pixels; None copies the files byte for byte.
    """

    source: Path  # mostly a folder
    shard_bytes: Annotated[int, size] = Field(default=256 << 20, description="at most (256M)")
    resize: int | None = Field(
        default=None,
        description="shorter side; else as it is",
        json_schema_extra={"metavar": "PIXELS"},
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        le=PILLOW_MAX_PIXELS,
        description="larger pictures are left out (%(default)s)",
        json_schema_extra={"metavar": "PIXELS"},
    )

    def check_out(self, out: Path) -> None:
        """Raise UserError if the shards would become files of the source."""
        if self.source.exists() and out.resolve().is_relative_to(self.source.resolve()):
            raise UserError(
                f"The output {out} lies inside the source {self.source}: name another folder."
            )

    def picture_identity(self) -> dict[str, Any]:
        """Return what changes pictures as JSON, a part of `Samples.identity`."""
        # Re-encoding depends on the encoder's release, a plain copy on nothing.
        identity = {"resize": self.resize, "pillow": Image.__version__ if self.resize else None}
        if self.max_pixels != MAX_PIXELS:
            identity["max_pixels"] = self.max_pixels
        return identity


def require_positive(**values: int | None) -> None:
    """Raise UserError naming the first value below 1; None stands for no value."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1.")


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey [H, W] or colour [H, W, 3] picture without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
