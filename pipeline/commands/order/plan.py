"""Which rank reads what, and the cost of other numbers of lanes, windows and processes.

config, index or plain counts + L, K, S, G, R -> assignments (lines, step by step)
                                              -> simulation  (one row per combination)
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.common.shipped import find, shipped
from pipeline.config import read_config
from pipeline.data.index import Index
from pipeline.data.index.splits import ALL
from pipeline.data.order import Order
from pipeline.data.order.simulate import Cost, advice, cost, simulate
from pipeline.data.settings import DataConfig
from pipeline.data.stream.datasets import open_indexes, order_of

Ints = NDArray[np.int64]

DEFAULT_SAMPLES = 1000  # per shard that need not exist
CONFIG_SUFFIXES = (".yaml", ".yml")
# Heading, field of `Cost` (or in other units), format, and what it means.
COLUMNS = (
    ("lanes", "lanes", "{:,}", "L: sequences of samples that are read side by side"),
    ("interleave", "interleave", "{:,}", "K: shards that a lane reads at a time"),
    ("window", "window", "{:,}", "S: samples of a lane that are shuffled together"),
    ("ranks", "world", "{:,}", "R: processes"),
    ("shards/batch", "shards_per_batch", "{:.0f}", "different shards in a batch, on average"),
    ("if uniform", "uniform_shards_per_batch", "{:.0f}", "the same if all samples were shuffled"),
    ("excess", "same_shard_excess", "{:.1f}x", "pairs of one shard in a batch / if uniform"),
    ("opens/step", "mean_opens_per_step", "{:.2f}", "shards whose reading begins, per step"),
    ("most opens", "max_opens_per_step", "{:,}", "the same in the worst step, the first left out"),
    ("at start", "opens_at_start", "{:,}", "the same in the first step, where every lane begins"),
    ("reads", "read_amplification", "{:.2f}x", "bytes read / bytes of the samples"),
    ("MB/step", "megabytes_per_step", "{:,.0f}", "read by all processes together in a step"),
    ("GB/epoch", "gigabytes_per_epoch", "{:,.0f}", "read by all processes together in an epoch"),
    ("MB/rank", "megabytes_per_rank", "{:,.0f}", "memory: a process holds at most so much encoded"),
)


@dataclass(frozen=True)
class Request:
    """The arguments of the command line; None = the config's value, or the default."""

    source: str | None = None  # a config or the path of an index; None = `shards` equal shards
    overrides: Sequence[str] = ()  # of the config
    batch_size: int | None = None
    seed: int | None = None
    split: str | None = None
    lanes: Sequence[int] | None = None
    interleave: Sequence[int] | None = None
    window: Sequence[int] | None = None
    world_size: Sequence[int] | None = None
    shards: int | None = None
    samples_per_shard: int | None = None  # None = as many as usual
    mean_bytes: int = 115_000  # of a sample in the shards, JPEG photographs for example


@dataclass(frozen=True)
class Plan:
    """The settings that determine an order."""

    data: DataConfig
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Simulation:
    """A row per combination of the numbers asked for."""

    num_samples: int
    num_shards: int
    mean_bytes: float  # of a sample, in the shards
    costs: list[Cost]
    advice: list[str]

    def text(self) -> str:
        """The shape of the data, the advice, the table, and the meaning of its columns."""
        rows = [[heading for heading, *_ in COLUMNS]]
        for row in self.costs:
            values = vars(row) | {
                "megabytes_per_step": row.bytes_per_step / 1e6,
                "gigabytes_per_epoch": row.bytes_per_epoch / 1e9,
                "megabytes_per_rank": row.memory_per_rank / 1e6,
            }
            rows.append([form.format(values[name]) for _, name, form, _ in COLUMNS])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        first = self.costs[0]
        return "\n".join(
            [
                f"{self.num_samples:,} samples of {self.mean_bytes:,.0f} bytes in "
                f"{self.num_shards:,} shards, {first.batch_size:,} per batch; the first "
                f"{first.num_steps:,} steps",
                *self.advice,
                "",
                *lines,
                "",
                *(f"{heading:<13}{meaning}" for heading, _, _, meaning in COLUMNS),
            ]
        )


def assignments(request: Request, steps: range) -> Iterator[dict[str, Any]]:
    """Yield step, slot, rank, shard and key of every slot, step by step.

    Plans the given steps only. Raises UserError before the first if the numbers do not fit.
    """
    if request.source is None:
        raise UserError("Name a config, or the directory of an index.")
    plan = _plan(request)
    (world,) = single(request.world_size, "--world-size") or (1,)
    check_world(plan.batch_size, world)
    indexes = open_indexes(plan.data)
    order = order_of(plan.data, indexes, plan.seed, plan.batch_size)
    per_rank = plan.batch_size // world
    return (
        {
            "step": step,
            "slot": slot,
            "rank": slot // per_rank,
            "shard": indexes[which].shards[shard].name,
            "key": key,
        }
        for step in steps
        for slot, (which, shard, key) in enumerate(
            _keys(indexes, plan.data.split, *order.samples(step))
        )
    )


def simulation(request: Request) -> Simulation:
    """Simulate every combination of the numbers, on counts alone; UserError if one does not fit.

    Simulates an epoch, or the part of it that takes a second or two.
    """
    if request.source is None:
        plan, counts, mean_bytes = _equal_shards(request)
    else:
        plan = _plan(replace(request, lanes=None, interleave=None, window=None))
        counts, mean_bytes = _counts(plan)
    worlds = request.world_size or (1,)
    for world in worlds:
        check_world(plan.batch_size, world)
    costs: list[Cost] = []
    for lanes, interleave, window in itertools.product(
        request.lanes or (plan.data.lanes,),
        request.interleave or (plan.data.interleave,),
        request.window or (plan.data.window,),
    ):
        order = Order(
            counts,
            seed=plan.seed,
            batch_size=plan.batch_size,
            lanes=lanes,
            interleave=interleave,
            window=window,
        )
        mix = simulate(order)
        costs += [cost(order, mix, world, mean_bytes) for world in worlds]
    num_shards = int((counts > 0).sum())
    return Simulation(int(counts.sum()), num_shards, mean_bytes, costs, advice(costs, num_shards))


def _plan(request: Request) -> Plan:
    """The settings of a config with the options of the command line, or those for an index."""
    source = request.source or ""
    numbers: dict[str, Any] = {"split": request.split}
    for name in ("lanes", "interleave", "window"):
        for value in single(getattr(request, name), f"--{name}"):
            numbers[name] = value
    given = [f"{name}={value}" for name, value in numbers.items() if value is not None]
    if Path(source).suffix in CONFIG_SUFFIXES or (
        source in shipped("train") and not Path(source).exists()
    ):
        whole = {"batch_size": request.batch_size, "seed": request.seed}
        overrides = [*request.overrides, *(f"data.{number}" for number in given)]
        overrides += [f"{name}={value}" for name, value in whole.items() if value is not None]
        config = read_config(find("train", source), overrides)
        return Plan(config.data, config.seed, config.batch_size)
    if request.overrides:
        raise UserError(
            f"{source} is not a config: {request.overrides[0]} has nothing to override."
        )
    if request.batch_size is None:
        raise UserError(f"{source} is an index, which has no batch size: set --batch-size.")
    split = [] if request.split else [f"split={ALL}"]
    data = strict.load(DataConfig, None, [f"path={json.dumps(source)}", *split, *given])
    return Plan(data, request.seed or 0, request.batch_size)


def single(values: Sequence[int] | None, option: str) -> Sequence[int]:
    """Return at most one number; UserError for several."""
    if values is not None and len(values) > 1:
        raise UserError(f"{option} {','.join(map(str, values))}: several numbers need --simulate.")
    return values or ()


def check_world(batch_size: int, world: int) -> None:
    """Raise UserError if a global batch cannot be cut into equal parts for `world` processes."""
    if batch_size % world:
        divisors = [d for d in range(1, 129) if batch_size % d == 0]
        raise UserError(
            f"--world-size {world} does not divide the global batch of {batch_size}: choose one of "
            f"{divisors}, or another batch."
        )


def _keys(
    indexes: Sequence[Index], split: str, which: Ints, shard: Ints, row: Ints
) -> list[tuple[int, int, str]]:
    """(data set, shard, key) of every slot; opens each shard's table once."""
    keys = [(0, 0, "")] * len(row)
    for source, number in np.unique(np.stack([which, shard]), axis=1).T.tolist():
        slots = np.flatnonzero((which == source) & (shard == number))
        table = indexes[source].table(number)
        rows = table.rows_of(indexes[source].split_number(split))[row[slots]]
        for slot, key in zip(slots.tolist(), table.keys(rows), strict=True):
            keys[slot] = (source, number, key)
    return keys


def _counts(plan: Plan) -> tuple[Ints, float]:
    """Samples per shard of a plan's one data set, and the mean bytes of a sample in the shards."""
    indexes = open_indexes(plan.data)
    if len(indexes) > 1:
        raise UserError(
            "--simulate takes one data set, and data.mixture names several: name the index of "
            "one of them, and its part of the batch as --batch-size."
        )
    index = next(iter(indexes))
    num_bytes = sum(shard.bytes for shard in index.shards)
    return index.counts(plan.data.split), num_bytes / max(index.num_samples, 1)


def _equal_shards(request: Request) -> tuple[Plan, Ints, float]:
    if request.shards is None or request.batch_size is None:
        raise UserError(
            "Name a config, or an index and --batch-size, or --shards and --batch-size."
        )
    samples = DEFAULT_SAMPLES if request.samples_per_shard is None else request.samples_per_shard
    if min(request.shards, samples, request.batch_size) < 1:
        raise UserError("--shards, --samples-per-shard and --batch-size must be at least 1.")
    counts = np.full(request.shards, samples, np.int64)
    plan = Plan(DataConfig(path="."), request.seed or 0, request.batch_size)
    return plan, counts, float(request.mean_bytes)
