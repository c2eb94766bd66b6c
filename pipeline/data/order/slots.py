"""Which slots of each step belong to a rank, computed from the order alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.order_v1 import Order

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RankSlots:
    """The slots of `rank` of `world`: stream positions in [start, end); end None = endless."""

    order: Order
    rank: int
    world: int
    start: int
    end: int | None

    @property
    def first_step(self) -> int:
        """The step that holds the start."""
        return self.start // self.order.batch_size

    @property
    def num_per_step(self) -> int:
        """Slots per step; the first and last step may have fewer, because of start and end."""
        return self.order.batch_size // self.world

    @property
    def lane_slots(self) -> range:
        """The lane slots that contain this rank's slots."""
        first, share = self.rank * self.num_per_step, self.order.lane_share
        return range(first // share, (first + self.num_per_step - 1) // share + 1)

    def positions(self, step: int) -> Ints:
        """Stream positions of a step's slots, in slot order."""
        positions = self.order.positions(step, rank=self.rank, world=self.world)
        return positions[self._in_limits(positions)]

    def includes(self, positions: Ints) -> NDArray[np.bool_]:
        """Return which stream positions belong to this rank."""
        order = self.order
        slots = positions % order.lanes * order.lane_share
        slots += positions % order.batch_size // order.lanes
        return (slots // self.num_per_step == self.rank) & self._in_limits(positions)

    def is_over(self, step: int) -> bool:
        """Whether no position is left at a step, for any rank."""
        return self.end is not None and step * self.order.batch_size >= self.end

    def _in_limits(self, positions: Ints) -> NDArray[np.bool_]:
        inside = positions >= self.start
        return inside if self.end is None else inside & (positions < self.end)
