"""Doctor's check of evaluations: their data, and what one of them reads."""

from contextlib import closing

import numpy as np

from pipeline.commands.doctor.finding import DoctorContext, Finding, Findings
from pipeline.common.console import in_bytes, plural
from pipeline.data.storage import is_url, open_storage
from pipeline.evaluation.cost import reading_cost
from pipeline.evaluation.splits import HeldOutSplit, held_out_splits
from pipeline.training.evaluated import open_evaluated


def check_evaluation(context: DoctorContext) -> Findings:
    """Data that is only evaluated can be read; samples, requests and bytes of an evaluation."""
    config = context.config
    if config is None:
        return
    said: list[str] = []
    config, evaluated = open_evaluated(config, said.append)
    yield from (Finding("evaluated", "ok", line) for line in said)
    if not evaluated and len(context.indexes) < len(config.data.sources):
        return
    indexes = [index for _, index in context.indexes]
    states = [{} for _ in indexes]
    for split in held_out_splits(config, indexes, states, evaluated):
        yield Finding("evaluated", "ok", _cost_line(split))


def _cost_line(split: HeldOutSplit) -> str:
    [source], [order], index = split.data.sources, split.order.orders, split.index
    with closing(open_storage(source.root, split.data.remote)) as storage:
        max_gap = storage.max_gap_bytes
    samples = np.array([shard.samples for shard in index.shards])
    num_bytes = np.array([shard.bytes for shard in index.shards])
    cost = reading_cost(order, samples, num_bytes, max_gap)
    total = int(index.counts(split.data.split).sum())
    name = f"{split.name}: " if split.name else ""
    besides = f", and {plural(cost.shards, 'table')} of the index" if is_url(source.path) else ""
    return (
        f"{name}each evaluation reads {cost.samples:,} of the {total:,} samples of split "
        f"{split.data.split} of {source.path}, from {plural(cost.shards, 'shard')}: about "
        f"{plural(cost.requests, 'request')} and {in_bytes(cost.num_bytes)}{besides}"
    )
