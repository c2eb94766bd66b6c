"""The settings of an export; `configs/export/` has examples."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from pipeline.common.component import Component
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
    """Which samples; null = as the run was trained."""

    path: str | None = None  # directory with the index
    shards: str | None = None  # directory of the shards, if not `path`
    split: str = ALL  # "all", or a split that the index names
    threads: int = Field(default=2, ge=1)  # that read and decode, per process; changes no result
    # Integer in the samples' JSON that is the label, dots lead into objects; null = as in `.cls`.
    label_field: str | None = None


class ExportConfig(Component):
    """Encode every sample of a dataset with a trained model."""

    run: str | None = None  # the run directory whose model encodes
    model: Encoder | None = None  # instead of `run`: anything that can be exported
    out: str  # the directory to fill, or an s3:// URL
    step: NonNegativeInt | Literal["best"] | None = (
        None  # of `run`: the checkpoint; null = the newest
    )
    weights: Literal["ema", "raw"] = "ema"  # of `run`: averaged, or as trained
    data: ExportData = ExportData()
    batch_size: int = Field(default=256, ge=1)  # rows encoded at once; batches never span shards
    precision: Literal["fp32", "bf16"] = "fp32"  # of encoding
    # What is stored: the posterior's mean and, where it has one, its log-variance; the mean alone;
    # or one sample z = mu + sigma eps, with eps by (seed, row number in the export, element).
    store: Literal["moments", "mean", "sample"] = "moments"
    seed: NonNegativeInt = 0  # of `store: sample`
    # hflip: of each image mirrored along its width, too, in fields of their own (mu_hflip ...).
    views: tuple[View, ...] = ("identity",)
    # Fields of the samples' JSON as columns of their own in Parquet: name -> type. All JSON is in
    # the column `metadata` in any case.
    columns: dict[str, ColumnType] = Field(default={})
    dtype: Dtype = "float32"  # bfloat16: in safetensors only
    # All written from one commit.
    formats: Annotated[tuple[Writer, ...], Field(min_length=1)] = (ParquetWriter(),)
    # A task with more failed rows than this is not committed: something else is wrong.
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)

    @property
    def encoder(self) -> EncoderBase:
        """What encodes."""
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
            raise ValueError("step and weights belong to run: give them inside of model")
        return self

    @model_validator(mode="after")
    def _seed_is_used(self) -> Self:
        if self.seed and self.store != "sample":
            raise ValueError(f"seed is {self.seed}, but store: {self.store} draws nothing")
        return self

    @model_validator(mode="after")
    def _views_are_known_and_begin_with_the_image(self) -> Self:
        if self.views not in (("identity",), ("identity", "hflip")):
            raise ValueError(
                f"views is [{', '.join(self.views)}], but must be [identity] or [identity, hflip]"
            )
        return self

    @model_validator(mode="after")
    def _columns_have_names_of_their_own(self) -> Self:
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
