"""What an order costs and how well it mixes, simulated on counts per shard without reading.

counts per shard + L, K, S, G, R --consecutive steps of the order itself--> Cost
mix: shards per batch, same-shard pairs     cost: opens, bytes, read amplification, memory
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.mixture import read_amplification
from pipeline.data.order.order_v1 import Order
from pipeline.data.order.slots import RankSlots

MAX_SAMPLES = 4_000_000  # per simulation: a second or two
MAX_SHOWN = 5
GOOD_SHARE = 0.7  # of the distinct shards per batch of a uniform shuffle

Ints = NDArray[np.int64]


def max_lanes_per_rank(order: Order, world: int) -> int:
    """The largest number of lanes that one rank reads."""
    ranks = (RankSlots(order, rank, world, start=0, end=None) for rank in range(world))
    return max(len(slots.lane_slots) for slots in ranks)


def memory_bound(order: Order, world: int, mean_bytes: float) -> float:
    """Upper bound on the bytes of encoded samples of one rank: two windows of each of its lanes."""
    window = min(order.window_size, order.lane_length(0))
    return 2 * window * max_lanes_per_rank(order, world) * mean_bytes


def lanes_that_read_once(batch_size: int, world: int) -> list[int]:
    """The numbers of lanes with which no byte is read twice: multiples of the ranks."""
    return [n for n in range(world, batch_size + 1, world) if batch_size % n == 0]


@dataclass(frozen=True)
class MixingStatistics:
    """How well batches mix over the simulated steps; shard opens as if one rank read all."""

    shards_per_batch: float
    uniform_shards_per_batch: float  # of a uniform permutation of all samples
    same_shard_excess: float  # pairs of one shard in a batch, over a uniform permutation's
    mean_opens_per_step: float  # shards (spans of a lane) whose reading begins
    max_opens_per_step: int  # after the first step, in which all lanes begin
    opens_at_start: int
    num_steps: int


def simulate(order: Order, num_steps: int | None = None) -> MixingStatistics:
    """Simulate steps from the start; None: one epoch, at most MAX_SAMPLES samples."""
    if num_steps is None:
        num_steps = max(1, min(order.num_samples, MAX_SAMPLES) // order.batch_size)
    shards = np.zeros((num_steps, order.lanes, order.lane_share), np.int32)
    opens = np.zeros(num_steps, np.int64)
    for lane_slot in range(order.lanes):
        shard, span = _lane(order, lane_slot, num_steps * order.lane_share)
        shards[:, lane_slot] = shard.reshape(num_steps, -1)
        _, first = np.unique(span, return_index=True)
        opens += np.bincount(first // order.lane_share, minlength=num_steps)
    distinct, pairs = _batch_statistics(shards.reshape(num_steps, -1))
    uniform_distinct, uniform_pairs = _uniform(order)
    return MixingStatistics(
        shards_per_batch=distinct,
        uniform_shards_per_batch=uniform_distinct,
        same_shard_excess=pairs / uniform_pairs if uniform_pairs else 1.0,
        mean_opens_per_step=float(opens.mean()),
        max_opens_per_step=int(opens[1:].max(initial=0)),
        opens_at_start=int(opens[0]),
        num_steps=num_steps,
    )


def _lane(order: Order, lane_slot: int, num_turns: int) -> tuple[Ints, Ints]:
    """The shard of each turn of a lane slot, and the number of the span it is read from."""
    shards: list[Ints] = []
    spans: list[Ints] = []
    turn = 0
    while turn < num_turns:
        run = order.run_at(lane_slot, turn)
        shard = order.window(run.epoch, run.lane, run.window)[0][run.start : run.stop]
        shards.append(shard)
        # A lane reads a shard as one span per epoch.
        spans.append((run.epoch * order.lanes + run.lane) * (int(order.shard_ids[-1]) + 1) + shard)
        turn = run.next_turn
    return np.concatenate(shards)[:num_turns], np.concatenate(spans)[:num_turns]


def _batch_statistics(shards: NDArray[np.int32]) -> tuple[float, float]:
    """Means over steps, `shards` [steps, G]: distinct shards, and pairs of samples of one shard."""
    distinct = pairs = 0
    for batch in np.sort(shards, axis=1):
        ends = np.flatnonzero(np.diff(batch, append=-1)) + 1
        counts = np.diff(ends, prepend=0)
        distinct += len(counts)
        pairs += int((counts * (counts - 1)).sum()) // 2
    return distinct / len(shards), pairs / len(shards)


def _uniform(order: Order) -> tuple[float, float]:
    """The same two means for G samples drawn uniformly without replacement."""
    counts, total = order.counts.astype(float), float(order.num_samples)
    drawn = min(order.batch_size, order.num_samples)
    lgamma = np.vectorize(math.lgamma, otypes=[float])
    # P(no sample of a shard) = C(N - q, G) / C(N, G)
    others = total - counts
    possible = others >= drawn
    missing = np.zeros(len(counts))
    ways = lgamma(others[possible] + 1) - lgamma(others[possible] - drawn + 1)
    missing[possible] = np.exp(ways - math.lgamma(total + 1) + math.lgamma(total - drawn + 1))
    pair = float((counts * (counts - 1)).sum()) / max(total * (total - 1), 1.0)
    return float((1 - missing).sum()), drawn * (drawn - 1) / 2 * pair


@dataclass(frozen=True)
class Cost(MixingStatistics):
    """Mixing statistics, the parameters of the order, and its cost on `world` ranks."""

    batch_size: int
    lanes: int
    interleave: int
    window: int
    world: int
    read_amplification: float
    bytes_per_step: float  # read by all ranks, as stored in the shards
    bytes_per_epoch: float
    memory_per_rank: float  # encoded samples in memory, at most


def cost(order: Order, mix: MixingStatistics, world: int, mean_bytes: float) -> Cost:
    """Return the cost of an order on `world` ranks for samples of `mean_bytes` in the shards."""
    amplification = read_amplification(order.lanes, world)
    return Cost(
        **vars(mix),
        batch_size=order.batch_size,
        lanes=order.lanes,
        interleave=order.interleave,
        window=order.window_size,
        world=world,
        read_amplification=amplification,
        bytes_per_step=order.batch_size * mean_bytes * amplification,
        bytes_per_epoch=order.num_samples * mean_bytes * amplification,
        memory_per_rank=memory_bound(order, world, mean_bytes),
    )


def advice(costs: Sequence[Cost], num_shards: int) -> list[str]:
    """Return advice, one sentence each."""
    lines: list[str] = []
    for world in sorted({row.world for row in costs}):
        rows = [row for row in costs if row.world == world]
        if all(row.read_amplification > 1 for row in rows):
            row = min(rows, key=lambda row: row.read_amplification)
            fitting = lanes_that_read_once(row.batch_size, world)
            near = sorted(fitting, key=lambda n: abs(math.log(n / row.lanes)))[:MAX_SHOWN]
            lines.append(
                f"{world} processes with {row.lanes} lanes read every byte "
                f"{row.read_amplification:.2f} times; a multiple of {world} lanes that divides the "
                f"batch reads it once: {', '.join(map(str, sorted(near)))}."
            )
    best = max(costs, key=lambda row: row.shards_per_batch)
    enough = [
        row for row in costs if row.shards_per_batch >= GOOD_SHARE * best.uniform_shards_per_batch
    ]
    if enough:
        least = min(enough, key=lambda row: (row.memory_per_rank, row.read_amplification))
        lines.append(
            f"Least memory for {GOOD_SHARE:.0%} of a uniform shuffle's shards per batch: "
            f"{least.lanes} lanes, interleave {least.interleave}, window {least.window}."
        )
    else:
        lines.append(
            f"No row reaches {GOOD_SHARE:.0%} of the {best.uniform_shards_per_batch:.0f} shards "
            "per batch of a uniform shuffle. More lanes or interleave bring more into a batch."
        )
    open_at_once = best.lanes * best.interleave
    if open_at_once > 2 * num_shards:
        lines.append(
            f"{best.lanes} lanes x interleave {best.interleave} could hold {open_at_once:,} shards "
            f"open, but there are {num_shards:,}: more of either changes little."
        )
    return lines
