"""Several data sets mixed by fixed weights; a single data set is a mixture of one.

    position X in the mixed endless stream -> data set d, position T_d in its own stream
    step s = X in [s G, (s + 1) G)       -> slots, by (data set, lane, position)

The positions X repeat a pattern of W = sum of weights entries. Data set d has w_d of them, spread
evenly (sorted by (2 i + 1) / (2 w_d), ties by the number of the data set). So every W samples
hold the exact share of each data set, the quotas of a step follow from s alone, and T = s G stays
the only state. Each data set keeps its own order, epochs and lanes. With one data set, a slot is
that of order-v1: (T % L) c + (T % G) // L.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.common.console import plural
from pipeline.common.files import canonical_json
from pipeline.data.order.order_v1 import Order, default_lanes

MIXTURE_VERSION = "mixture-v1"

Ints = NDArray[np.int64]


def lanes_of_parts(batch_size: int, lanes: int | None, weights: Sequence[int]) -> list[int | None]:
    """Divide `lanes` (None = the default) by weight; a single data set gets all of them.

    A lane then takes equally many turns per step in every data set.
    """
    if len(weights) == 1:
        return [lanes]
    total = default_lanes(batch_size) if lanes is None else lanes
    return [max(1, round(total * weight / sum(weights))) for weight in weights]


def read_amplification(lanes: int, world: int) -> float:
    """How often a shard's bytes are read on average: twice for lanes that two ranks share."""
    return (lanes + world - math.gcd(lanes, world)) / lanes


def dataset_id_of(ids: Sequence[str]) -> str:
    """Hex identity of several data sets together, by those of each; of one its own."""
    if len(ids) == 1:
        return ids[0]
    return hashlib.sha256(canonical_json([MIXTURE_VERSION, list(ids)])).hexdigest()


class Mixture:
    """The order of a run: which sample of which data set fills which slot of which step."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[int], batch_size: int) -> None:
        """`weights`: integers; the share of a data set is its weight over their sum."""
        self.orders = tuple(orders)
        self.weights = tuple(weights)
        self.batch_size = batch_size
        self._period = sum(weights)
        weight = np.array(weights, np.int64)
        source = np.repeat(np.arange(len(weight)), weight)
        turn = np.arange(self._period) - np.repeat(np.cumsum(weight) - weight, weight)
        # Exact: different fractions of numbers below 2^25 are different floats.
        pattern = source[np.lexsort((source, (2 * turn + 1) / (2 * weight[source])))]
        self._in_pattern = [np.flatnonzero(pattern == d) for d in range(len(weight))]
        self._before = [np.concatenate([[0], np.cumsum(pattern == d)]) for d in range(len(weight))]

    @property
    def num_samples(self) -> int:
        """Total number of samples of all data sets."""
        return sum(order.num_samples for order in self.orders)

    @property
    def seed(self) -> int:
        """The seed, the same for all data sets."""
        return self.orders[0].seed

    @property
    def order_id(self) -> str:
        """Hex identity of position -> sample."""
        if len(self.orders) == 1:
            return self.orders[0].order_id
        ids = [order.order_id for order in self.orders]
        return hashlib.sha256(canonical_json([MIXTURE_VERSION, ids, self.weights])).hexdigest()

    @property
    def dataset_id(self) -> str:
        """Hex identity of the data."""
        return dataset_id_of([order.dataset_id for order in self.orders])

    def positions_before(self, source: int, position: Ints | int) -> Ints:
        """How many of the first `position` samples of the stream come from a data set."""
        rounds, rest = np.divmod(position, self._period)
        return rounds * self.weights[source] + self._before[source][rest]

    def start_of(self, source: int, step: int) -> int:
        """A data set's position T_d at the start of a step."""
        return int(self.positions_before(source, step * self.batch_size))

    def first_turn(self, source: int, lane_slot: int, step: int) -> int:
        """The first turn of a data set's lane slot at or after the start of a step."""
        return -((lane_slot - self.start_of(source, step)) // self.orders[source].lanes)

    def most_per_step(self, source: int) -> int:
        """Upper bound on the samples of a data set in one step."""
        return min(self.batch_size, self.batch_size * self.weights[source] // self._period + 2)

    def steps_of(self, source: int, positions: Ints) -> Ints:
        """The steps that positions of a data set fall into."""
        rounds, rest = np.divmod(positions, self.weights[source])
        return (rounds * self._period + self._in_pattern[source][rest]) // self.batch_size

    def slots(self, source: int, positions: Ints) -> tuple[Ints, Ints]:
        """(step, slot in the global batch) of positions of a data set."""
        step = self.steps_of(source, positions)
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        base = np.zeros_like(positions)
        for earlier in range(source):
            base += self.positions_before(earlier, end) - self.positions_before(earlier, first)
        start, stop = self.positions_before(source, first), self.positions_before(source, end)
        lanes = self.orders[source].lanes
        turn, lane = np.divmod(positions, lanes)
        in_earlier_lanes = _below_lane(stop, lane, lanes) - _below_lane(start, lane, lanes)
        first_turn = -((lane - start) // lanes)  # of this lane in this step
        return step, base + in_earlier_lanes + turn - first_turn

    def samples(self, step: int) -> tuple[Ints, Ints, Ints]:
        """(data set, shard, row within the split) of every slot of a step, by planning alone."""
        which, shard, row = np.empty((3, self.batch_size), np.int64)
        for source, order in enumerate(self.orders):
            start, stop = self.start_of(source, step), self.start_of(source, step + 1)
            positions = np.arange(start, stop)
            slots = self.slots(source, positions)[1]
            which[slots] = source
            shard[slots], row[slots] = order.samples(positions)
        return which, shard, row


def reading_plan(mixture: Mixture, world: int) -> str:
    """Say in a line what is read per epoch, and how often."""
    parts: list[str] = []
    for order, weight in zip(mixture.orders, mixture.weights, strict=True):
        share = f"{weight / sum(mixture.weights):.1%} of each batch from " * (
            len(mixture.orders) > 1
        )
        amplification = read_amplification(order.lanes, world)
        parts.append(
            f"{share}{plural(order.num_samples, 'sample')} in "
            f"{plural(len(order.counts), 'shard')}, {plural(order.lanes, 'lane')}: "
            f"{plural(world, 'process')} {'reads' if world == 1 else 'read'} every byte "
            f"{amplification:.2f} times"
        )
    return "; ".join(parts)


def _below_lane(end: Ints, lane: Ints, lanes: int) -> Ints:
    """How many positions t < end have t % lanes < lane."""
    return end // lanes * lane + np.minimum(end % lanes, lane)
