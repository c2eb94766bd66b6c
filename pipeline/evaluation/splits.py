"""The held-out splits that an evaluation reads.

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


@dataclass(frozen=True)
class HeldOutSplit:
    """The held-out split of one data set, to be read once and without augmentations."""

    data: DataConfig
    index: Index
    order: Mixture
    states: States


def held_out_splits(
    config: TrainConfig, indexes: Sequence[Index], states: Sequence[States]
) -> list[HeldOutSplit]:
    """Return the held-out splits that have samples. states: see `check_data`."""
    splits: list[HeldOutSplit] = []
    for source, index, seen in zip(config.data.sources, indexes, states, strict=True):
        held_out = {"split": config.evaluation.split, "augmentations": ()}
        single = {"path": source.path, "shards": source.shards, "mixture": ()}
        data = config.data.model_copy(update=held_out | single)
        if index.counts(data.split).any():
            order = order_of(data, [index], config.seed, config.batch_size, "mask")
            splits.append(HeldOutSplit(data, index, order, seen))
    return splits
