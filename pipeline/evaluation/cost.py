"""What one evaluation reads, estimated from the counts of an index: no table is opened."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import Order

Ints = NDArray[np.int64]


class ReadingCost(NamedTuple):
    """Of all processes together, without tables of the index, of which one per shard is read."""

    samples: int
    shards: int
    requests: int  # at most `samples`
    num_bytes: int  # of the shards, gaps that are read over included


def reading_cost(order: Order, samples: Ints, num_bytes: Ints, max_gap: int) -> ReadingCost:
    """Estimate what reading every sample of an order once takes.

    samples, num_bytes: of each whole shard [shards]. max_gap: see `Storage.max_gap_bytes`. The
    samples of a shard are taken to be of one size, and those to be read to lie scattered in it.
    """
    wanted, ids = order.counts, order.shard_ids
    share, size = wanted / samples[ids], num_bytes[ids] / samples[ids]
    # From this many unwanted samples in a row on, a gap is not read over.
    first_long = np.floor(max_gap / size) + 1
    is_long = (1 - share) ** first_long  # probability of a gap
    requests = float((1 + (wanted - 1) * is_long).sum())
    # Where a window ends, a read ends in each of the shards that the lane reads at a time.
    windows = -(-order.lane_length(0) // order.window_size)
    at_a_time = min(order.interleave, -(-len(ids) // order.lanes))
    ends = order.lanes * (windows - 1) * at_a_time + order.lanes - 1
    requests += ends * float(np.average(1 - is_long, weights=wanted))
    # Mean length of a gap, in samples, that is read over: sum of k p (1 - p)^k for k < first_long.
    rest = 1 - share
    short = rest * (1 - is_long) / share - first_long * is_long
    read = wanted * size + (wanted - 1) * size * np.maximum(short, 0)
    num = order.num_samples
    return ReadingCost(num, len(ids), min(round(requests), num), round(float(read.sum())))
