"""The splits that an evaluation reads.

config + opened indexes -> HeldOutSplit of each data set: what is read of it, and in which order
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.order.mixture import Mixture
from pipeline.data.settings import DataConfig
from pipeline.data.stream.datasets import order_of
from pipeline.metrics.settings import UNNAMED
from pipeline.training.evaluated import EvaluatedSet


@dataclass(frozen=True)
class HeldOutSplit:
    """A split of one data set, or a choice of it, to be read once and without augmentations."""

    data: DataConfig
    index: Index
    order: Mixture
    states: States
    name: str = UNNAMED  # of the data set in the names of metrics


def held_out_splits(
    config: TrainConfig,
    indexes: Sequence[Index],
    states: Sequence[States],
    evaluated: Sequence[EvaluatedSet] = (),
) -> list[HeldOutSplit]:
    """Return the splits that have samples: of the training's data, or of data of its own.

    states: see `check_data`. evaluated: see `open_evaluated`.
    """
    if evaluated:
        return [_split_of(config, one.data, one.index, one.states, one.name) for one in evaluated]
    parts: list[tuple[DataConfig, Index, States]] = []
    for source, index, seen in zip(config.data.sources, indexes, states, strict=True):
        held_out = {"split": config.evaluation.split, "augmentations": ()}
        single = {"path": source.path, "shards": source.shards, "mixture": ()}
        parts.append((config.data.model_copy(update=held_out | single), index, seen))
    counts = [int(index.counts(config.evaluation.split).sum()) for index in indexes]
    limits = divided(config.evaluation.max_samples, counts)
    return [
        _split_of(config, *part, max_samples=limit)
        for part, limit in zip(parts, limits, strict=True)
        if limit
    ]


def divided(max_samples: int | None, counts: Sequence[int]) -> list[int]:
    """Divide a number of samples over data sets with so many, by their shares of all of them.

    The sum is max_samples exactly, or that of the counts if it is smaller.
    """
    total = sum(counts)
    if max_samples is None or total <= max_samples:
        return list(counts)
    limits = [max_samples * count // total for count in counts]
    rests = [max_samples * count % total for count in counts]
    largest = sorted(range(len(counts)), key=lambda number: (-rests[number], number))
    for number in largest[: max_samples - sum(limits)]:
        limits[number] += 1
    return limits


def _split_of(
    config: TrainConfig,
    data: DataConfig,
    index: Index,
    states: States,
    name: str = UNNAMED,
    *,
    max_samples: int | None = None,
) -> HeldOutSplit:
    """max_samples: None: that of the config."""
    limit = config.evaluation.max_samples if max_samples is None else max_samples
    order = order_of(data, [index], config.seed, config.batch_size, "mask", max_samples=limit)
    return HeldOutSplit(data, index, order, states, name)
