"""What a person asks of an evaluation, and the config that does it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.common.errors import UserError
from pipeline.common.explain import complaint, explain
from pipeline.common.strict.dialect import parse
from pipeline.config import TrainConfig
from pipeline.data.decode import Decode
from pipeline.data.decode.image import Size
from pipeline.data.index.splits import ALL
from pipeline.metrics import Metric
from pipeline.metrics.settings import EvaluationConfig


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated otherwise than a training does it; None: as there."""

    split: str | None = None
    metrics: tuple[Metric, ...] | None = None
    max_samples: int | Literal["all"] | None = None
    size: Size | None = None  # of pictures, for fully convolutional models

    def applied(self, config: TrainConfig, decode: Decode) -> TrainConfig:
        """Return the config of the evaluation; nothing is augmented.

        decode: of pictures of `size`. Raises UserError for metrics that the model cannot have.
        """
        # An augmentation of the training need not fit the size.
        data = config.data.model_copy(update={"decode": decode, "augmentations": ()})
        changed: dict[str, Any] = {}
        if self.split is not None:
            changed |= {"split": self.split, "data": None}
        if self.max_samples is not None:
            changed["max_samples"] = None if self.max_samples == "all" else self.max_samples
        if self.metrics is not None:
            changed["metrics"] = self.metrics
        evaluation = config.evaluation.model_copy(update=changed)
        monitor = config.monitor
        if self.metrics is not None:  # the one that ranks images need not be among them
            monitor = monitor.model_copy(update={"rows_by": None})
        if self.split is not None or self.max_samples is not None:
            monitor = monitor.model_copy(update={"pictured": ()})
        try:
            evaluation.check_metrics(config.model, decode)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        parts = {"data": data, "evaluation": evaluation, "monitor": monitor}
        return config.model_copy(update=parts)


def on_data(config: TrainConfig, path: str, shards: str | None, split: str | None) -> TrainConfig:
    """Return the config of an evaluation on a data set that nothing was trained on.

    shards: None: beside the index. split: None: all samples.
    """
    chosen = split or ALL
    place = {"path": path, "shards": shards, "mixture": (), "split": chosen}
    data = config.data.model_copy(update=place)
    evaluation = config.evaluation.model_copy(update={"split": chosen, "data": None})
    # Its samples have other keys.
    monitor = config.monitor.model_copy(update={"pictured": ()})
    return config.model_copy(update={"data": data, "evaluation": evaluation, "monitor": monitor})


def one_data_set(data: Sequence[str], shards: Sequence[str]) -> tuple[str, str | None]:
    """Return the locations of the index and of the shards; UserError for more than one of each."""
    for option, given in (("--data", data), ("--shards", shards)):
        if len(given) > 1:
            raise UserError(
                f"{option} is given {len(given)} times ({', '.join(given)}): one data set is "
                "evaluated at a time, so give it once."
            )
    return data[0], shards[0] if shards else None


def read_metrics(words: Sequence[str]) -> tuple[Metric, ...]:
    """Return metrics from the words of a command line; UserError for what is none.

    A word is a kind, as `psnr`, or in YAML a kind with its settings, as `{kind: psnr, decodes:
    sample}`: a list of a config, whose overrides are written alike.
    """
    settings: list[Any] = []
    for word in words:
        value, problems = parse(word)
        if problems or not isinstance(value, str | dict):
            raise UserError(
                f"--metrics {word!r} is no metric: write its kind, as psnr, or its settings in "
                "YAML, as '{kind: psnr, decodes: sample}'."
            )
        settings.append({"kind": value} if isinstance(value, str) else value)
    text = json.dumps({"metrics": settings})
    try:
        return EvaluationConfig.model_validate_json(text, strict=True).metrics
    except ValidationError as error:
        raise complaint("--metrics", explain(error, EvaluationConfig)) from None
