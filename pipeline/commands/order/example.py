"""An order small enough to be drawn, step by step, from shards to the slots of each rank.

counts + seed, G, L, K, S, R --the order itself--> lines: lanes, groups, windows, steps
"""

import itertools
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.commands.order.plan import Request, check_world, single
from pipeline.common.errors import UserError
from pipeline.data.order.order_v1 import LaneSpans, Order, keyed_permutation

Ints = NDArray[np.int64]

MAX_DRAWN = 120  # samples; their names still fit into lines
LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class Example:
    """Numbers of an order that is drawn; docs/order.md shows the default ones."""

    shards: int = 10
    samples_per_shard: int = 4
    batch_size: int = 8
    lanes: int = 4
    interleave: int = 2
    window: int = 4
    ranks: int = 2
    seed: int = 0


def example_of(request: Request) -> Example:
    """The numbers that a request names, the default ones for the rest."""
    if request.source is not None:
        raise UserError(
            f"--example draws equal shards that need not exist: leave out {request.source}."
        )
    asked: dict[str, int | None] = {
        "shards": request.shards,
        "samples_per_shard": request.samples_per_shard,
        "batch_size": request.batch_size,
        "seed": request.seed,
    }
    for option, values in (
        ("lanes", request.lanes),
        ("interleave", request.interleave),
        ("window", request.window),
        ("world-size", request.world_size),
    ):
        name = "ranks" if option == "world-size" else option
        asked[name] = next(iter(single(values, f"--{option}")), None)
    return Example(**{name: value for name, value in asked.items() if value is not None})


def draw(example: Example) -> str:
    """Draw the first epoch; raise UserError if it is too large, or its numbers do not fit."""
    if min(example.shards, example.samples_per_shard, example.batch_size) < 1:
        raise UserError("--shards, --samples-per-shard and --batch-size must be at least 1.")
    check_world(example.batch_size, example.ranks)
    num_samples = example.shards * example.samples_per_shard
    if example.shards > len(LETTERS) or num_samples > MAX_DRAWN or example.batch_size > MAX_DRAWN:
        raise UserError(
            f"--example draws at most {len(LETTERS)} shards, and {MAX_DRAWN} samples in all and in "
            f"a batch, not {example.shards} shards with {num_samples} samples and a batch of "
            f"{example.batch_size}: choose smaller --shards, --samples-per-shard or --batch-size."
        )
    order = Order(
        [example.samples_per_shard] * example.shards,
        seed=example.seed,
        batch_size=example.batch_size,
        lanes=example.lanes,
        interleave=example.interleave,
        window=example.window,
    )
    return "\n".join([*_head(order, example.ranks), *_lanes(order), *_steps(order, example.ranks)])


def _head(order: Order, ranks: int) -> Iterator[str]:
    yield (
        f"{len(order.counts)} shards, a to {LETTERS[len(order.counts) - 1]}, of "
        f"{order.counts[0]} samples each: N = {order.num_samples}. c2 is sample 2 of shard c."
    )
    yield (
        f"G = {order.batch_size} samples in a global batch, L = {order.lanes} lanes, "
        f"K = {order.interleave} spans in a group, S = {order.window_size} samples in a window,"
    )
    yield (
        f"R = {ranks} ranks, seed {order.seed}. A lane has G / L = {order.lane_share} slots of "
        f"each batch, a rank G / R = {order.batch_size // ranks}."
    )


def _lanes(order: Order) -> Iterator[str]:
    shuffled = keyed_permutation(len(order.counts), "shards", order.seed, 0)
    spans = [order.spans_of_lane(0, lane) for lane in range(order.lanes)]
    windows = [_windows(order, lane) for lane in range(order.lanes)]
    yield "\n1. Shuffle the shards, lay their samples end to end, cut them into L lanes of equal"
    yield f"   length. The shards: {' '.join(LETTERS[shard] for shard in shuffled)}."
    yield "   A shard's part in a lane is a span: f0-3 holds the samples 0 to 3 of shard f."
    position = np.argsort(shuffled)  # of a shard in the shuffled sequence
    yield from _per_lane(
        " ".join(_spans(one)[span] for span in np.argsort(position[one.shard])) for one in spans
    )
    yield "\n2. Shuffle each lane's spans; group them by K. The first groups differ in size,"
    yield "   so that the lanes do not all open new shards at the same step."
    yield from _per_lane(
        " ".join(
            f"({' '.join(_spans(one)[first:end])})"
            for first, end in itertools.pairwise(one.group_first.tolist())
        )
        for one in spans
    )
    yield "\n3. Merge the spans of a group evenly; each span is read strictly forward."
    yield from _per_lane(" ".join(before) for before, _ in windows)
    yield "\n4. Cut the lane into windows of S samples; shuffle within each window."
    yield from _per_lane(" ".join(after) for _, after in windows)


def _spans(spans: LaneSpans) -> list[str]:
    """The spans in reading order, as f0-3: shard, first and last sample."""
    ends = spans.low + spans.length - 1
    columns = (spans.shard.tolist(), spans.low.tolist(), ends.tolist())
    return [f"{LETTERS[shard]}{low}-{end}" for shard, low, end in zip(*columns, strict=True)]


def _windows(order: Order, lane: int) -> tuple[list[str], list[str]]:
    """The samples of a lane's first epoch, window by window, before and after the shuffle."""
    before: list[str] = []
    after: list[str] = []
    for window in range(-(-order.lane_length(lane) // order.window_size)):
        names = _names(*order.window(0, lane, window))
        shuffle = keyed_permutation(len(names), "window", order.seed, 0, lane, window)
        read = [names[index] for index in np.argsort(shuffle)]
        before += read
        after.append("[" + " ".join(names) + "]")
    return before, after


def _steps(order: Order, ranks: int) -> Iterator[str]:
    yield "\n5. Take one sample of each lane in turn: position T = 0, 1, 2 ... is lane T % L's."
    yield "   Step s takes T = G s to G s + G - 1; a lane's samples lie side by side in its slots."
    slots = np.arange(order.batch_size)
    rows = [
        ("slot", [*map(str, slots)]),
        ("rank", [*map(str, slots // (order.batch_size // ranks))]),
        ("lane", [*map(str, slots // order.lane_share)]),
        ("T - G s", [*map(str, order.positions(0))]),
    ]
    for step in range(-(-order.num_samples // order.batch_size)):
        positions = order.positions(step)
        epochs = order.lane_positions(positions).epoch.tolist()
        names = _names(*order.samples(positions))
        marked = [name + "'" * epoch for name, epoch in zip(names, epochs, strict=True)]
        rows.append((f"step {step}", marked))
    width = max(len(cell) for _, cells in rows for cell in cells)
    for title, cells in rows:
        yield f"   {title:<9}{' '.join(cell.rjust(width) for cell in cells)}"
    if order.num_samples % order.batch_size:
        yield "   A batch goes on into the next epoch; ' marks a sample of that one."


def _names(shard: Ints, row: Ints) -> list[str]:
    pairs = zip(shard.tolist(), row.tolist(), strict=True)
    return [f"{LETTERS[which]}{number}" for which, number in pairs]


def _per_lane(texts: Iterable[str]) -> list[str]:
    return [f"   lane {lane:<4}{text}" for lane, text in enumerate(texts)]
