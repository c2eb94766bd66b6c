"""The `data:` section: which samples, in which order, decoded how."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.common.component import Component
from pipeline.data.augmentations import Augmentation
from pipeline.data.decode import Decode, ImageDecode
from pipeline.data.storage import RemotePolicy

# max_bad_fraction is taken of at least this many samples: of fewer, one bad one is a large part.
MIN_SAMPLES_JUDGED = 1000

Positive = Annotated[int, Field(ge=1)]


class DataLocation(Component):
    """Where a data set lies."""

    path: str  # the directory or URL that holds `index/`
    shards: str | None = None  # where the shards lie; None = in `path`

    @property
    def root(self) -> str:
        """The directory or URL of the shards."""
        return self.path if self.shards is None else self.shards


class EvaluatedData(DataLocation):
    """A data set to evaluate on; decoded as the training's `data`, and never augmented."""

    # a split that the index names, "all", or a pattern of shard names, such as val-*
    split: str = "all"


class DataSource(DataLocation):
    """One data set of a mixture."""

    weight: Annotated[int, Field(ge=1, le=10_000)] = 1  # relative to the sum of all weights


class DataConfig(Component):
    """What to read and how. `lanes`, `interleave` and `window` are part of the order's identity."""

    path: str | None = None  # the directory or URL that holds `index/`
    shards: str | None = None  # where the shards lie; None = in `path`
    # Several data sets instead of `path`, each endless by itself, mixed by weight.
    mixture: tuple[DataSource, ...] = ()
    # A split that the index names, "all", or a pattern of shard names, such as train-*.
    split: str = "train"
    decode: Decode = ImageDecode()  # what the members of a sample hold, and how they are read
    # In this order, keyed by sample and epoch; the model's target is the augmented image.
    augmentations: tuple[Augmentation, ...] = ()
    lanes: Positive | None = None  # L; None = the largest divisor of the global batch up to 64
    interleave: Annotated[int, Field(ge=1, le=1024)] = 8  # K: shards that one lane reads at a time
    window: Annotated[int, Field(ge=1, le=1 << 20)] = 256  # S: samples per shuffled window
    threads: Positive = 2  # decoding threads per process
    # Fetching threads per process; 0 = the decoding threads fetch, too. None = 0 for a local disk,
    # 8 for a network file system, one per connection for remote shards.
    read_threads: Annotated[int, Field(ge=0)] | None = None
    remote: RemotePolicy = RemotePolicy()  # for shards and indexes behind URLs
    prefetch: Positive = 2  # batches decoded ahead
    # Compare every member read with the CRC-32 that `pack` and `index --deep` wrote down.
    verify_checksums: bool = False
    # The run stops above this fraction of the delivered samples (counted as at least 1000).
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    # The run also stops at more than this many bad samples in a row in one process.
    max_bad_in_row: Annotated[int, Field(ge=0)] = 100

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The data sets: the one at `path`, or those of the mixture."""
        if self.path is not None:
            return (DataSource(path=self.path, shards=self.shards),)
        return self.mixture

    @model_validator(mode="after")
    def _data_is_named_once(self) -> Self:
        if (self.path is None) == (not self.mixture):
            raise ValueError(
                "name the data either by path or by mixture, but "
                + ("neither is given" if self.path is None else "both are given")
            )
        if self.path is None and self.shards is not None:
            raise ValueError("shards belongs to path: each entry of mixture has its own")
        return self

    @model_validator(mode="after")
    def _only_images_are_augmented(self) -> Self:
        decode = self.decode
        if not isinstance(decode, ImageDecode):
            if self.augmentations:
                raise ValueError(
                    f"augmentations cut and mirror images, but decode.kind is {decode.kind}"
                )
            return self
        shorter = min(decode.height_and_width)
        for augmentation in self.augmentations:
            if augmentation.kind == "random_crop" and augmentation.shorter_side < shorter:
                raise ValueError(
                    f"random_crop.shorter_side {augmentation.shorter_side} is below {shorter}, the "
                    "shorter side of decode.size: there is no such part in the image"
                )
        return self
