"""order-v1: against its slow twin, its invariants, its frozen digests, and its laziness."""

import hashlib
import json
import time
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.data.order import Order, default_lanes
from tests.data.order_reference import Shape, SlowOrder


@st.composite
def shapes(draw, tails=("carry", "mask", "drop")):
    counts = draw(st.lists(st.integers(0, 23), min_size=1, max_size=9))
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    share = draw(st.integers(1, 4))
    tail = draw(st.sampled_from(tails))
    total = sum(counts)
    assume(total > 0)
    assume(tail != "drop" or total >= lanes * share)
    return Shape(
        counts=tuple(counts),
        seed=draw(st.integers(0, 2**40)),
        G=lanes * share,
        L=lanes,
        K=draw(st.integers(1, 5)),
        S=draw(st.sampled_from([1, 3, 5, 16, 64])),
        tail=tail,
    )


def order_of(shape: Shape, **changes) -> Order:
    shape = shape._replace(**changes)
    return Order(
        shape.counts,
        seed=shape.seed,
        batch_size=shape.G,
        lanes=shape.L,
        interleave=shape.K,
        window=shape.S,
        tail=shape.tail,
    )


def slots_of(order: Order, step: int, rank: int = 0, world: int = 1):
    positions = order.positions(step, rank=rank, world=world)
    places = order.lane_positions(positions)
    shards, rows = order.samples(positions)
    weights = 1 - places.repeated.astype(int)
    samples = zip(shards.tolist(), rows.tolist(), strict=True)
    return list(zip(places.epoch.tolist(), samples, weights.tolist(), strict=True))


def num_steps(order: Order, epochs: int) -> int:
    return -(-epochs * order.epoch_length // order.batch_size)


@settings(max_examples=150, deadline=None)
@given(shapes())
def test_order_is_its_definition(shape):
    order, slow = order_of(shape), SlowOrder(shape)
    for step in range(num_steps(order, 2) + 1):
        assert slots_of(order, step) == slow.step(step)


@settings(max_examples=50, deadline=None)
@given(shapes(tails=("carry", "mask")))
def test_every_sample_comes_once_per_epoch(shape):
    order = order_of(shape)
    every = {(s, r) for s, count in enumerate(shape.counts) for r in range(count)}
    seen: dict[int, Counter] = defaultdict(Counter)
    for step in range(num_steps(order, 3)):
        for epoch, sample, weight in slots_of(order, step):
            seen[epoch][sample] += weight
    for epoch in range(3 if shape.tail == "mask" else 2):
        assert {s for s, n in seen[epoch].items() if n == 1} == every
        assert set(seen[epoch].values()) <= {0, 1}


def test_drop_leaves_out_less_than_a_batch_and_never_repeats():
    order = order_of(Shape((7, 5, 9), seed=1, G=4, L=2, K=2, S=3, tail="drop"))
    for epoch in range(3):
        seen = Counter(
            sample
            for step in range(5 * epoch, 5 * (epoch + 1))
            for e, sample, _ in slots_of(order, step)
            if e == epoch
        )
        assert len(seen) == 20
        assert set(seen.values()) == {1}


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(0, 50))
def test_ranks_share_out_what_one_rank_gets(shape, step):
    order = order_of(shape)
    whole = slots_of(order, step)
    for world in (w for w in range(1, shape.G + 1) if shape.G % w == 0):
        parts = [slots_of(order, step, rank, world) for rank in range(world)]
        assert [slot for part in parts for slot in part] == whole


@settings(max_examples=40, deadline=None)
@given(shapes(tails=("carry",)))
def test_samples_do_not_depend_on_the_batch_size(shape):
    order, doubled = order_of(shape), order_of(shape, G=2 * shape.G)
    positions = np.arange(2 * order.num_samples)
    assert [a.tolist() for a in order.samples(positions)] == [
        a.tolist() for a in doubled.samples(positions)
    ]
    assert order.order_id == doubled.order_id


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_spans_are_read_strictly_forward_before_the_window_shuffle(shape):
    """Per (epoch, lane, shard), windows follow one another without overlap."""
    order = order_of(shape)
    for epoch in range(2):
        for lane in range(shape.L):
            last: dict[int, int] = {}
            for window in range(-(-order.lane_length(lane) // shape.S)):
                shards, rows = order.window(epoch, lane, window)
                for shard in set(shards.tolist()):
                    here = rows[shards == shard]
                    assert here.min() > last.get(shard, -1)
                    assert sorted(here) == list(range(here.min(), here.max() + 1))
                    last[shard] = int(here.max())


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 60))
def test_runs_of_a_lane_slot_are_its_positions(shape, first_turn):
    """What the stream fetches, from any turn on, is what the order places there."""
    order = order_of(shape)
    for lane_slot in range(shape.L):
        turn = first_turn
        for _ in range(12):
            run = order.run_at(lane_slot, turn)
            assert run.next_turn > turn
            positions = np.arange(run.turn, run.next_turn) * shape.L + lane_slot
            places = order.lane_positions(positions)
            assert set(places.epoch) == {run.epoch}
            assert set(places.lane) == {run.lane}
            assert set(places.repeated) == {run.repeated}
            in_window = places.index - run.window * shape.S
            assert in_window.tolist() == list(range(run.start, run.stop))
            turn = run.next_turn


GOLDEN_SHAPES = [
    Shape((1000,) * 40, seed=0, G=512, L=64, K=8, S=256),
    Shape((1000,) * 40, seed=1, G=512, L=64, K=8, S=256),
    Shape((1000, 1, 0, 333, 2048), seed=0, G=96, L=48, K=8, S=256),
    Shape((5,), seed=3, G=8, L=8, K=4, S=16),
    Shape((3, 4, 5), seed=7, G=64, L=64, K=8, S=256, tail="mask"),
    Shape((17, 0, 23, 9), seed=2, G=12, L=4, K=1, S=5, tail="mask"),
    Shape((17, 0, 23, 9), seed=2, G=12, L=12, K=3, S=7, tail="drop"),
    Shape(tuple(range(100)), seed=2**63, G=60, L=60, K=8, S=64),
]


def test_order_v1_is_frozen(golden):
    """A change here breaks every run that has a checkpoint: it needs a new version name."""
    digests = {}
    for shape in GOLDEN_SHAPES:
        order = order_of(shape)
        digest = hashlib.sha256()
        for step in (0, 1, 2, num_steps(order, 1), num_steps(order, 1) + 1, 1000):
            for values in order.samples(order.positions(step)):
                digest.update(values.astype("<i8").tobytes())
        name = json.dumps(shape._replace(counts=[len(shape.counts), sum(shape.counts)]))
        digests[name] = digest.hexdigest()
    golden("order-v1.json", json.dumps(digests, indent=1) + "\n")


def test_the_identity_names_everything_but_the_batch(golden):
    def identity(**changes):
        given = {"seed": 1, "batch_size": 64, "lanes": 8, "interleave": 4, "window": 16}
        given |= {"dataset_id": "d", "split": "train"} | changes
        return Order([100], **given).order_id

    golden("order-v1-identity.txt", identity() + "\n")
    assert identity(batch_size=128) == identity()
    changes = [{"seed": 2}, {"lanes": 4}, {"interleave": 5}, {"window": 17}]
    changes += [{"dataset_id": "e"}, {"split": "held_out"}]
    assert len({identity(**change) for change in [{}, *changes]}) == 7


def test_a_billion_samples_are_planned_lazily():
    counts = np.full(100_000, 10_000)
    tracemalloc.start()
    try:
        started = time.process_time()
        order = Order(counts, seed=0, batch_size=512)
        first = order.samples(order.positions(0))
        seconds = time.process_time() - started
        order.samples(order.positions(1_000_000))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(first[0].tolist())) > 100
    assert seconds < 1
    assert peak_bytes < 40e6  # a few arrays of 10^5 shards; one of 10^9 samples has 8e9


def test_extreme_shards_merge_exactly():
    """Float fractions stay exact for shards of the largest size allowed beside tiny ones."""
    order = Order([(1 << 25) - 1, 1, 7, (1 << 25) - 2], seed=5, batch_size=2, lanes=2, window=64)
    last: dict[tuple[int, int], int] = {}
    for lane in range(2):
        for window in [0, 1, 2]:
            shards, rows = order.window(0, lane, window)
            assert len(set(zip(shards.tolist(), rows.tolist(), strict=True))) == 64
            for shard in set(shards.tolist()):
                here = rows[shards == shard]
                assert here.min() > last.get((lane, shard), -1)
                last[lane, shard] = int(here.max())


def test_default_lanes_is_the_largest_divisor_up_to_64():
    assert [default_lanes(g) for g in (512, 96, 7, 130, 1, 67)] == [64, 48, 7, 26, 1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"counts": [5], "batch_size": 6, "lanes": 4}, "data.lanes = 4 does not divide"),
        ({"counts": [0, 0], "batch_size": 6}, "no samples"),
        ({"counts": [5], "batch_size": 6, "tail": "drop"}, "no batch is left"),
        ({"counts": [1 << 25], "batch_size": 6}, "smaller shards"),
    ],
)
def test_impossible_numbers_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        Order(arguments.pop("counts"), seed=0, **arguments)
