"""The choice of samples to evaluate: exact, uniform, the same for all, cheap at any size."""

import time
from collections import Counter

import numpy as np
import pytest

from pipeline.common.console import in_bytes
from pipeline.data.index.members import plan_reads
from pipeline.data.order import Order
from pipeline.data.order.choice import MAX_SHARDS, ChosenOrder, choose
from pipeline.data.storage.base import LOCAL_GAP_BYTES, REMOTE_GAP_BYTES
from pipeline.evaluation.cost import reading_cost
from pipeline.evaluation.splits import divided

COUNTS = np.array([7, 0, 24, 1, 16, 0, 12])  # 60 samples
SAMPLE_BYTES = 100_000


def samples_of(order: Order) -> list[tuple[int, int]]:
    """Every sample of the first epoch, without the repeats that fill the last batch."""
    positions = np.arange(order.epoch_length)
    counted = positions[~order.lane_positions(positions).repeated]
    shard, row = order.samples(counted)
    return list(zip(shard.tolist(), row.tolist(), strict=True))


def chosen_order(num: int, **settings: int) -> ChosenOrder:
    settings = {"seed": 0, "batch_size": 12} | settings
    return ChosenOrder(COUNTS, num, dataset_id="d", split="all", tail="mask", **settings)


@pytest.mark.parametrize("num", [1, 2, 29, 30, 31, 59])
def test_so_many_different_samples_are_chosen(num: int):
    shard, row = choose(COUNTS, num, "key")
    assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == num
    assert (row < COUNTS[shard]).all()
    assert (row >= 0).all()


@pytest.mark.parametrize("num", [1, 17, 59])
def test_batch_lanes_window_and_seed_of_a_run_change_nothing(num: int):
    first = samples_of(chosen_order(num))
    assert len(set(first)) == len(first) == num
    for settings in ({"batch_size": 5}, {"lanes": 1}, {"window": 3, "interleave": 2}, {"seed": 9}):
        assert sorted(samples_of(chosen_order(num, **settings))) == sorted(first)
    assert sorted(samples_of(chosen_order(num))) == list(
        zip(*(part.tolist() for part in choose(COUNTS, num, "d/all")), strict=True)
    )


def test_what_is_chosen_belongs_to_the_identity():
    orders = [chosen_order(17), chosen_order(18)]
    assert len({order.order_id for order in orders}) == 2
    assert len({order.split for order in orders}) == 2
    shard, row = choose(COUNTS, 17, "another data set/all")
    assert sorted(samples_of(orders[0])) != list(zip(shard.tolist(), row.tolist(), strict=True))


@pytest.mark.parametrize("num", [3, 30, 50])
def test_every_sample_is_chosen_equally_often(num: int):
    """Over many keys: each count within 5 standard deviations of its binomial mean."""
    num_keys, found = 2000, Counter[tuple[int, int]]()
    for key in range(num_keys):
        shard, row = choose(COUNTS, num, str(key))
        found.update(zip(shard.tolist(), row.tolist(), strict=True))
    share = num / COUNTS.sum()
    assert len(found) == COUNTS.sum()
    bound = 5 * np.sqrt(num_keys * share * (1 - share))
    assert all(abs(count - num_keys * share) < bound for count in found.values())


def test_of_very_many_shards_some_are_chosen_and_every_sample_equally_often():
    """Shards of one, two and three samples; counts by the size of the shard and by the row."""
    counts = np.resize([1, 2, 3], 3 * MAX_SHARDS)
    num_keys, num, found, shards = 300, 3000, Counter[tuple[int, int]](), 0
    for key in range(num_keys):
        shard, row = choose(counts, num, str(key))
        found.update(zip(counts[shard].tolist(), row.tolist(), strict=True))
        shards = max(shards, len(set(shard.tolist())))
    assert shards < 1.1 * MAX_SHARDS
    share = num / counts.sum()
    assert set(found) == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}
    for count in found.values():
        assert abs(count / num_keys / MAX_SHARDS - share) < 0.01 * share


def test_a_limit_is_divided_by_the_sizes_of_the_data_sets():
    assert divided(10, [30, 60, 10]) == [3, 6, 1]
    assert divided(10, [1, 1, 1]) == [1, 1, 1]
    assert divided(None, [4, 5]) == [4, 5]
    assert divided(7, [10, 10, 10]) == [3, 2, 2]
    assert divided(5, [0, 10]) == [0, 5]


@pytest.mark.parametrize("held_out", [0.02, 1.0])
@pytest.mark.parametrize("max_gap", [LOCAL_GAP_BYTES, REMOTE_GAP_BYTES])
def test_cost_at_a_billion_samples(held_out: float, max_gap: int):
    """10^9 samples in 10^5 shards, simulated on counts: every read of an evaluation is planned."""
    num_shards, per_shard, num = 100_000, 10_000, 50_000
    counts = np.full(num_shards, round(per_shard * held_out))
    started = time.perf_counter()
    order = ChosenOrder(counts, num, seed=0, batch_size=256, tail="mask", dataset_id="d", split="s")
    seconds = time.perf_counter() - started

    # The rows of the split lie scattered in each shard: here at multiples of a step.
    step = per_shard // counts[0]
    found = Counter[str]()
    tables: set[int] = set()
    for lane in range(order.lanes):
        for window in range(-(-order.lane_length(lane) // order.window_size)):
            shard, row = order.window(0, lane, window)
            size = np.full(len(shard), SAMPLE_BYTES)
            reads, _ = plan_reads(shard, row * step * SAMPLE_BYTES, size, max_gap)
            found["samples"] += len(shard)
            found["requests"] += len(reads)
            found["bytes"] += sum(read.num_bytes for read in reads)
            tables.update(shard.tolist())
    whole = np.full(num_shards, per_shard)
    cost = reading_cost(order, whole, whole * SAMPLE_BYTES, max_gap)
    print(
        f"{held_out:.0%} held out of 10^9 samples in 10^5 shards, gaps up to {max_gap >> 10} KiB: "
        f"{found['samples']:,} samples by {found['requests']:,} requests of "
        f"{in_bytes(found['bytes'])}, {len(tables):,} tables; estimated {cost.requests:,} "
        f"requests, {in_bytes(cost.num_bytes)}; chosen in {seconds * 1e3:.0f} ms"
    )
    assert found["samples"] == num
    assert found["requests"] <= num
    assert len(tables) == cost.shards < 1.1 * MAX_SHARDS
    assert found["bytes"] < 1.05 * num * SAMPLE_BYTES
    assert cost.requests == pytest.approx(found["requests"], rel=0.02)
    assert cost.num_bytes == pytest.approx(found["bytes"], rel=0.02)
    assert seconds < 5


@pytest.mark.parametrize(("share", "size"), [(0.02, 2_500), (0.2, 30_000), (0.5, 100_000)])
def test_gaps_that_are_read_over_are_in_the_estimate(share: float, size: int):
    """Rows of a split that lie scattered as a hash scatters them."""
    rng, num_shards, per_shard = np.random.default_rng(0), 50, 1000
    rows = [np.flatnonzero(rng.random(per_shard) < share) for _ in range(num_shards)]
    counts = np.array([len(part) for part in rows])
    order = Order(counts, seed=0, batch_size=8, tail="mask")
    requests = num_bytes = 0
    for lane in range(order.lanes):
        for window in range(-(-order.lane_length(lane) // order.window_size)):
            shard, row = order.window(0, lane, window)
            place = np.array([rows[s][r] for s, r in zip(shard, row, strict=True)])
            sizes = np.full(len(shard), size)
            reads, _ = plan_reads(shard, place * size, sizes, REMOTE_GAP_BYTES)
            requests += len(reads)
            num_bytes += sum(read.num_bytes for read in reads)
    whole = np.full(num_shards, per_shard)
    cost = reading_cost(order, whole, whole * size, REMOTE_GAP_BYTES)
    assert cost.requests == pytest.approx(requests, rel=0.1)
    assert cost.num_bytes == pytest.approx(num_bytes, rel=0.1)
    assert requests < counts.sum()
