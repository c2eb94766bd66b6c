"""The settings of an export; `configs/export/` has examples."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from pipeline.component import Component
from pipeline.data.index.splits import ALL
from pipeline.writers import Dtype, ParquetWriter, Writer


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
    dtype: Dtype = "float32"  # bfloat16: in safetensors only
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
    def _formats_hold_dtype(self) -> Self:
        unfit = [writer.kind for writer in self.formats if self.dtype not in writer.dtypes]
        if unfit:
            raise ValueError(
                f"dtype is {self.dtype!r}, which {', '.join(unfit)} cannot hold: numpy and Arrow "
                "know no such type. Set dtype to float32 or float16, or formats to "
                "[{kind: safetensors}] alone."
            )
        return self
