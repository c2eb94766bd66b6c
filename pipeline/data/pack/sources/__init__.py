"""Sources: anything that `pack` turns into shards, numbered samples with keys and members.

source -> `sizes()` decides, before anything is written, which samples go to which shard
       -> `part(lo, hi)` travels to a worker process -> `read()` yields the samples of one shard.

Add a source: one file with a class that follows `Source`, and a `pack_*` function in `pack.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One sample as it goes into a shard: members by suffix, all of them bytes."""

    key: str
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Broken:
    """A file that is no readable sample: left out of the shards, listed in the report."""

    name: str
    reason: str


class Part(Protocol):
    """A contiguous stretch of a source; small, and picklable for a worker process."""

    def read(self) -> Iterator[Sample | Broken]:
        """Yield the samples in order; the same ones, byte for byte, on every call."""
        ...


class Source(Protocol):
    """Samples in a fixed order, known before any of them is read."""

    def __len__(self) -> int:
        """Return the number of samples, broken ones included."""
        ...

    def sizes(self) -> Sequence[int]:
        """Return about how many bytes each sample takes; decides the shard boundaries."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return what the shards are made from, as JSON: equal identities pack to equal bytes."""
        ...

    def sidecars(self) -> Mapping[str, bytes]:
        """Return further files to lie beside the shards, name -> content."""
        ...

    def part(self, lo: int, hi: int) -> Part:
        """Return samples lo..hi-1."""
        ...
