"""The simulation: against a slow count of the same order, against published figures, its advice."""

import math
from collections import Counter

import numpy as np
import pytest

from pipeline.data.order import Order
from pipeline.data.order.simulate import advice, cost, lanes_that_read_once, memory_bound, simulate

# Simulated once before this program was written, by another one:
# L, K, S -> distinct shards per batch, same-shard pairs over a uniform shuffle's.
PUBLISHED = {(32, 4, 512): (132, 9.6), (64, 4, 256): (223, 4.9), (64, 8, 256): (311, 2.9)}


def order(counts: list[int], **changes) -> Order:
    numbers = {"seed": 3, "batch_size": 12, "lanes": 6, "interleave": 2, "window": 5}
    return Order(counts, **(numbers | changes))


@pytest.mark.parametrize("numbers", PUBLISHED, ids=str)
def test_the_published_simulation_comes_out_again(numbers: tuple[int, int, int]):
    lanes, interleave, window = numbers
    mix = simulate(
        order(
            [1000] * 1280, batch_size=512, lanes=lanes, interleave=interleave, window=window, seed=0
        )
    )
    shards, excess = PUBLISHED[numbers]
    assert mix.num_steps == 2500  # an epoch
    assert mix.shards_per_batch == pytest.approx(shards, rel=0.02)
    assert mix.same_shard_excess == pytest.approx(excess, rel=0.02)
    assert mix.uniform_shards_per_batch == pytest.approx(422, rel=0.002)
    assert mix.mean_opens_per_step == pytest.approx(1280 / 2500)  # each shard once an epoch
    assert mix.max_opens_per_step <= 64  # the lanes' opens are staggered; 512 if they were not


@pytest.mark.parametrize("counts", [[7, 0, 24, 1, 16, 12], [3] * 40, [200]], ids=len)
def test_figures_are_those_of_a_slow_count(counts: list[int]):
    simulated, steps = order(counts), 9
    mix = simulate(simulated, steps)
    distinct, pairs, opened = [], [], set()
    opens = Counter()
    for step in range(steps):
        positions = simulated.positions(step)
        shards = simulated.samples(positions)[0].tolist()
        per_shard = Counter(shards)
        distinct.append(len(per_shard))
        pairs.append(sum(math.comb(count, 2) for count in per_shard.values()))
        places = simulated.lane_positions(positions)
        spans = set(zip(places.epoch.tolist(), places.lane.tolist(), shards, strict=True))
        opens[step] = len(spans - opened)
        opened |= spans
    assert mix.shards_per_batch == pytest.approx(np.mean(distinct))
    assert mix.mean_opens_per_step == pytest.approx(np.mean(list(opens.values())))
    assert mix.opens_at_start == opens[0]
    assert mix.max_opens_per_step == max(opens[step] for step in range(1, steps))
    total = sum(counts)
    uniform = math.comb(12, 2) * sum(math.comb(q, 2) for q in counts) / math.comb(total, 2)
    assert mix.same_shard_excess == pytest.approx(np.mean(pairs) / uniform)
    seen = sum(1 - math.comb(total - q, 12) / math.comb(total, 12) for q in counts)
    assert mix.uniform_shards_per_batch == pytest.approx(seen)


def test_bytes_and_memory_follow_from_lanes_and_ranks():
    simulated = order([100] * 20)
    mix = simulate(simulated)
    alone, four = (cost(simulated, mix, world, mean_bytes=1000) for world in (1, 4))
    assert (alone.read_amplification, four.read_amplification) == (1, (6 + 4 - 2) / 6)
    assert alone.bytes_per_epoch == 2000 * 1000
    assert four.bytes_per_step == pytest.approx(12 * 1000 * 8 / 6)
    assert alone.memory_per_rank == 2 * 5 * 6 * 1000  # two windows of six lanes
    assert four.memory_per_rank == 2 * 5 * 2 * 1000  # three slots lie in two lanes
    assert memory_bound(order([6]), 1, 1000) == 2 * 1 * 6 * 1000  # a lane has one sample only


def test_the_advice_names_lanes_that_read_every_byte_once():
    simulated = order([100] * 20)
    costs = [cost(simulated, simulate(simulated), world, mean_bytes=1.0) for world in (2, 4)]
    told = "\n".join(advice(costs, 20))
    assert "4 processes with 6 lanes read every byte 1.33 times" in told
    assert "reads it once: 4, 12." in told
    assert "2 processes" not in told
    assert lanes_that_read_once(12, 4) == [4, 12]


def test_every_sample_in_a_shard_of_its_own():
    mix = simulate(order([1] * 500))
    assert (mix.shards_per_batch, mix.same_shard_excess) == (12, 1)
