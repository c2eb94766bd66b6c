"""The `data:` section: which samples, in which order, decoded how."""

from typing import Annotated

from pydantic import Field

from pipeline.component import Component
from pipeline.data.decode import Decode, ImageDecode

Positive = Annotated[int, Field(ge=1)]


class DataConfig(Component):
    """What to read and how. `lanes`, `interleave` and `window` are part of the order's identity."""

    path: str  # the directory that holds `index/`
    shards: str | None = None  # where the shards lie; None = in `path`
    split: str = "train"  # a split that the index names, or "all"
    decode: Decode = ImageDecode()
    lanes: Positive | None = None  # L; None = the largest divisor of the global batch up to 64
    interleave: Annotated[int, Field(ge=1, le=1024)] = 8  # K: shards that one lane reads at a time
    window: Annotated[int, Field(ge=1, le=1 << 20)] = 256  # S: samples per shuffled window
    threads: Positive = 2  # that decode, per process
    read_threads: Positive = 2  # that fetch, per process
    prefetch: Positive = 2  # batches decoded ahead
    # Of the samples delivered (counted as at least 1000): above it, the run stops.
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

    @property
    def shards_root(self) -> str:
        """The directory or URL of the shards."""
        return self.path if self.shards is None else self.shards
