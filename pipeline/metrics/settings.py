"""The `evaluation:` section: on which data, how often, and what is measured."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.common.component import Component
from pipeline.common.strict import set_default
from pipeline.data.decode import Decode
from pipeline.data.settings import EvaluatedData
from pipeline.metrics import LogLikelihood, Metric, SquaredErrorMetric
from pipeline.models.autoencoder import ModelConfig

NAME = re.compile(r"[a-z][a-z0-9_]*")
UNNAMED = ""  # the name of a data set that has none


def _one_or_several(data: Any) -> Literal["EvaluatedData", "dict"]:
    """Whether settings are of one data set, or of several by name."""
    is_one = isinstance(data, EvaluatedData) or (
        isinstance(data, dict) and not data.keys().isdisjoint(EvaluatedData.model_fields)
    )
    return "EvaluatedData" if is_one else "dict"


OneOrSeveral = Annotated[
    Annotated[EvaluatedData, Tag("EvaluatedData")]
    | Annotated[dict[str, EvaluatedData], Tag("dict")],
    Discriminator(_one_or_several),
]


class EvaluationConfig(Component):
    """Evaluation during the run; also at its start and end."""

    # Data of its own: {path, shards, split}, or several by name, whose metrics are called
    # eval/NAME/...; null: of the training's data, the split below.
    data: OneOrSeveral | None = None
    # Of the training's data: a split that the index names, or a pattern of shard names.
    split: str = "held_out"
    # At most so many samples of each data set of `data`, or of `split` as a whole, chosen by a
    # hash: the same ones in every run; null: all of them.
    max_samples: int | None = Field(default=50_000, gt=0)
    every_steps: int = Field(default=1000, gt=0)  # steps between two evaluations
    # Besides the parts of the objective: {kind: squared_error}, {kind: psnr}, and so on.
    metrics: tuple[Metric, ...] = (SquaredErrorMetric(), LogLikelihood())
    # Early stopping: end the run after this many evaluations in a row without a new best value of
    # checkpoint.keep.best; null: never.
    patience: int | None = Field(default=None, gt=0)

    @property
    def own(self) -> dict[str, EvaluatedData]:
        """Data sets other than the training's, by name; a single one may have the name ""."""
        if self.data is None:
            return {}
        return {UNNAMED: self.data} if isinstance(self.data, EvaluatedData) else self.data

    def relocated(self, own: dict[str, EvaluatedData]) -> Self:
        """Return the settings with `own` data sets in other locations."""
        return self.model_copy(update={"data": own.get(UNNAMED, own) if own else None})

    def check_metrics(self, model: ModelConfig, decode: Decode) -> None:
        """Raise ValueError for figures of one name, or that this model or data cannot have."""
        labels = [metric.label for metric in self.metrics]
        if len(set(labels)) < len(labels):
            raise ValueError(f"evaluation.metrics names a figure twice: {', '.join(labels)}")
        for metric in self.metrics:
            metric.check(model, decode)

    def check_files(self) -> None:
        """Raise UserError if a network's file is missing or another; reads all of each."""
        for file in dict.fromkeys(file for metric in self.metrics for file in metric.files):
            file.check()

    def check_name(self, metric: str, setting: str) -> None:
        """Raise ValueError for the name of a metric of a data set that is not evaluated."""
        view, *names = metric.split("/")
        known = [name for name in self.own if name]
        if known and (len(names) < 2 or names[0] not in known):
            listed = ", ".join(f"{view}/{name}/{names[-1] if names else 'loss'}" for name in known)
            raise ValueError(
                f"{setting} {metric} is of no data set that evaluation.data names: choose {listed}"
            )
        labels = [entry.label for entry in self.metrics]
        if not known and len(names) > 1 and names[0] not in labels:
            raise ValueError(
                f"{setting} {metric} is of a data set {names[0]}, but evaluation.data names none: "
                f"choose {view}/{names[-1]}, or name it in evaluation.data"
            )

    @model_validator(mode="after")
    def _data_is_named(self) -> Self:
        own, of_training = self.own, type(self).model_fields["split"].default
        if own and self.split != of_training:
            raise ValueError(
                f"split {self.split} is of the training's data, but data names other data: give "
                "that its split, as {path: ..., split: ...}, or leave one of the two out"
            )
        if self.data is not None and not own:
            raise ValueError("data names no data set: give {path: ...}, or null")
        for name in () if isinstance(self.data, EvaluatedData) else own:
            if NAME.fullmatch(name) is None:
                raise ValueError(f"data: {name!r} is no name of a data set: use a-z, 0-9 and _")
        return self


def setting_of(name: str) -> str:
    """The setting that holds the data set of a name; see `EvaluationConfig.own`."""
    return f"evaluation.data.{name}" if name else "evaluation.data"


def evaluation_before_version_3(tree: dict[str, Any]) -> None:
    """Fill in the defaults of a config's version 2: every sample was evaluated."""
    set_default(tree, "evaluation.max_samples", None)
