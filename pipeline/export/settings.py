"""The settings of an export; `configs/export/` has examples."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from pipeline.component import Component
from pipeline.data.index.splits import ALL
from pipeline.writers import ParquetWriter, Writer


class ExportData(Component):
    """Which samples; null = as the run was trained."""

    path: str | None = None  # directory with the index
    shards: str | None = None  # directory of the shards, if not `path`
    split: str = ALL  # "all", or a split that the index names
    threads: int = Field(default=2, ge=1)  # that read and decode, per process; changes no result


class ExportConfig(Component):
    """Encode every sample of a dataset with a trained model."""

    run: str  # the run directory
    out: str  # the directory to fill
    step: NonNegativeInt | Literal["best"] | None = None  # checkpoint; null = the newest
    weights: Literal["ema", "raw"] = "ema"  # averaged, or as trained
    data: ExportData = ExportData()
    batch_size: int = Field(default=256, ge=1)  # rows encoded at once; batches never span shards
    precision: Literal["fp32", "bf16"] = "fp32"
    # What is stored: the posterior's mean and, where it has one, its log-variance; or the mean.
    store: Literal["moments", "mean"] = "moments"
    dtype: Literal["float32", "float16"] = "float32"
    formats: Annotated[tuple[Writer, ...], Field(min_length=1)] = (ParquetWriter(),)
    # A task with more failed rows than this is not committed: something else is wrong.
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _formats_differ(self) -> Self:
        kinds = [writer.kind for writer in self.formats]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"formats name a kind twice: {', '.join(kinds)}")
        return self

    @model_validator(mode="after")
    def _formats_are_one_file_each(self) -> Self:
        pairs = [writer.kind for writer in self.formats if len(writer.suffixes) > 1]
        if pairs:
            raise ValueError(
                f"formats: {', '.join(pairs)} has several files per shard, and the export stages "
                "one per format only. Choose among tar, parquet and safetensors."
            )
        return self
