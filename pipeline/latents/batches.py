"""Which rows form which batch: order-v1 of `pipeline.data.order` over the shards of an export.

    (batch_size, seed, epoch, step, rank) -> positions -> (shard, row) -> row numbers, weights

The steps of an epoch are planned in groups that share windows of the order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.data.order import Order

# Fewer than in training: lanes x interleave shards are open at a time, and of a remote export one
# row group of each is in memory.
MAX_LANES, INTERLEAVE = 8, 4
WINDOW = 256

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """The part of the rows to read: the slots of a rank, every n-th step of a worker."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    workers: int = 1

    def check(self, batch_size: int) -> None:
        """Raise UserError unless the numbers fit."""
        for name, number, of, count in (
            ("rank", self.rank, "world", self.world),
            ("worker", self.worker, "workers", self.workers),
        ):
            if not 0 <= number < count:
                raise UserError(
                    f"{name} = {number} does not fit {of} = {count}: 0 <= {name} < {of}."
                )
        if batch_size < 1 or batch_size % self.world:
            near = max(1, round(batch_size / self.world)) * self.world
            raise UserError(
                f"batch_size = {batch_size} is the number of rows per step over all ranks, and "
                f"must be a positive multiple of world = {self.world}: such as {near}."
            )


def make_order(
    counts: Sequence[int] | Ints,
    *,
    batch_size: int,
    seed: int,
    tail: Literal["mask", "drop"],
    lanes: int | None,
    interleave: int,
    window: int,
) -> Order:
    """Return the order; raise UserError on numbers that do not fit. lanes: None = at most 8."""
    for name, number in (("lanes", lanes), ("interleave", interleave), ("window", window)):
        if number is not None and number < 1:
            raise UserError(f"{name} = {number}, but must be at least 1.")
    if lanes is None:
        lanes = max(d for d in range(1, MAX_LANES + 1) if batch_size % d == 0)
    return Order(
        counts,
        seed=seed,
        batch_size=batch_size,
        lanes=lanes,
        interleave=interleave,
        window=window,
        tail=tail,
    )


def steps_per_epoch(order: Order) -> int:
    """Return the steps of an epoch; the last one's repeats included under `mask`."""
    return order.epoch_length // order.batch_size


def plan_steps(
    order: Order, first_row: Ints, *, epoch: int, start: int, share: Share
) -> Iterator[tuple[Ints, NDArray[np.bool_]]]:
    """Yield the row numbers [b] of each step from `start` on, and which of them are repeats [b].

    first_row: of each shard.
    """
    num_steps = steps_per_epoch(order)
    ours = range(start + share.worker, num_steps, share.workers)
    at_once = max(1, order.window_size // order.lane_share // share.workers)
    for begin in range(0, len(ours), at_once):
        steps = [epoch * num_steps + step for step in ours[begin : begin + at_once]]
        positions = np.concatenate(
            [order.positions(step, rank=share.rank, world=share.world) for step in steps]
        )
        shard, row = order.samples(positions)
        rows = (first_row[shard] + row).reshape(len(steps), -1)
        yield from zip(
            rows, order.lane_positions(positions).repeated.reshape(rows.shape), strict=True
        )
