"""The settings of an export; `configs/export/` has examples."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from pipeline.common.component import Component
from pipeline.data.decode.image import Size, Suffix
from pipeline.data.index.splits import ALL
from pipeline.export.encoders import Encoder, EncoderBase, RunEncoder
from pipeline.latents.formats.writers import (
    COLUMNS,
    FIELDS,
    ColumnType,
    Dtype,
    ParquetWriter,
    Writer,
)

View = Literal["identity", "hflip"]


class ExportData(Component):
    """Which samples; null = as in the training."""

    path: str | None = None  # directory with the index
    shards: str | None = None  # directory of the shards, if not `path`
    split: str = ALL  # "all", or a split that the index names
    # Of the members that hold the pictures, most wanted first: [jpg, png].
    suffixes: Annotated[tuple[Suffix, ...], Field(min_length=1)] | None = None
    # For reading and decoding, per process; no effect on results.
    threads: int = Field(default=2, ge=1)
    # Field of the samples' JSON with an integer label, dots for nested objects; null: from `.cls`.
    label_field: str | None = None


class ExportConfig(Component):
    """Encode every sample of a dataset with a trained model."""

    run: str | None = None  # the run directory whose model encodes
    model: Encoder | None = None  # instead of `run`: anything that can be exported
    out: str  # the directory to fill, or an s3:// URL
    # Of `run`: the checkpoint; null = the newest.
    step: NonNegativeInt | Literal["best"] | None = None
    weights: Literal["ema", "raw"] = "ema"  # of `run`: averaged, or as trained
    data: ExportData = ExportData()
    # Of the pictures, if not that of the training: pixels of a side, or [height, width]. For fully
    # convolutional backbones (resnet); the latents grow with the pictures.
    size: Size | None = None
    batch_size: int = Field(default=256, ge=1)  # rows encoded at once; batches never span shards
    precision: Literal["fp32", "bf16"] = "fp32"  # of encoding
    # What is stored: the posterior's mean and, where it has one, its log-variance; the mean alone;
    # or one sample z = mu + sigma eps, with eps by (seed, row number in the export, element).
    store: Literal["moments", "mean", "sample"] = "moments"
    seed: NonNegativeInt = 0  # of `store: sample`
    # hflip: encode each image mirrored along its width as well, as mu_hflip, logvar_hflip, z_hflip.
    views: tuple[View, ...] = ("identity",)
    # Fields of the samples' JSON as extra Parquet columns: name -> type. The column `metadata` has
    # the whole JSON in any case.
    columns: dict[str, ColumnType] = Field(default={})
    dtype: Dtype = "float32"  # bfloat16: in safetensors only
    # All written from one commit.
    formats: Annotated[tuple[Writer, ...], Field(min_length=1)] = (ParquetWriter(),)
    # The export is not finished if a larger fraction of its rows failed. A task with more (counted
    # as at least 1000 rows), or without any row that can be used, is not committed.
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)

    @property
    def encoder(self) -> EncoderBase:
        """The encoder that the settings name."""
        if self.model is not None:
            return self.model
        assert self.run is not None
        return RunEncoder(path=self.run, step=self.step, weights=self.weights)

    @model_validator(mode="after")
    def _model_is_named_once(self) -> Self:
        if (self.run is None) == (self.model is None):
            raise ValueError(
                "name the model either by run or by model, but "
                + ("neither is given" if self.run is None else "both are given")
            )
        if self.model is not None and (self.step, self.weights) != (None, "ema"):
            raise ValueError("step and weights belong to run: give them inside model")
        return self

    @model_validator(mode="after")
    def _seed_is_used(self) -> Self:
        if self.seed and self.store != "sample":
            raise ValueError(f"seed is {self.seed}, but store: {self.store} draws nothing")
        return self

    @model_validator(mode="after")
    def _views_fit(self) -> Self:
        if self.views not in (("identity",), ("identity", "hflip")):
            raise ValueError(
                f"views is [{', '.join(self.views)}], but must be [identity] or [identity, hflip]"
            )
        return self

    @model_validator(mode="after")
    def _column_names_fit(self) -> Self:
        for name in self.columns:
            if name in (*COLUMNS, *FIELDS):
                raise ValueError(f"columns names {name!r}, which every export has already")
            if not name or "." in name:
                raise ValueError(
                    f"columns names {name!r}: name fields at the top of the JSON, without dots"
                )
        return self

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
