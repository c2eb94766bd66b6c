"""Mixtures: exact shares, one integer of state, the same slots on any number of processes."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.order import Order
from pipeline.data.order.mixture import Mixture, lanes_of_parts
from pipeline.data.settings import DataConfig
from pipeline.data.stream.datasets import open_indexes, order_of
from pipeline.monitoring.ledger import planned_digest
from tests.data.streams import IMAGES, SEED, write_shards
from tests.shards import open_stream

SHAPES = [  # weights, lanes of each, global batch
    ((1,), (6,), 12),
    ((3, 1), (5, 2), 16),
    ((2, 5, 1), (3, 4, 1), 24),
    ((1, 1000), (1, 8), 8),
    ((7, 7), (6, 6), 10),
]
NUM_STEPS = 40


def mixture_of(weights, lanes, batch_size) -> Mixture:
    orders = [
        Order([5 * n + 30, 17], seed=n, batch_size=batch_size if len(lanes) == 1 else L, lanes=L)
        for n, L in enumerate(lanes)
    ]
    return Mixture(orders, weights, batch_size)


def slow_slots(weights, lanes, batch_size, num_steps) -> dict[tuple[int, int], tuple[int, int]]:
    """(step, slot) -> (data set, its position), from the definition: lists and fractions."""
    period = sorted(
        (Fraction(2 * i + 1, 2 * weight), d)
        for d, weight in enumerate(weights)
        for i in range(weight)
    )
    stream, counts = [], [0] * len(weights)
    while len(stream) < num_steps * batch_size:
        for _, d in period:
            stream.append((d, counts[d]))
            counts[d] += 1
    slots = {}
    for step in range(num_steps):
        batch = stream[step * batch_size : (step + 1) * batch_size]
        for slot, entry in enumerate(sorted(batch, key=lambda e: (e[0], e[1] % lanes[e[0]], e[1]))):
            slots[step, slot] = entry
    return slots


@pytest.mark.parametrize("weights, lanes, batch_size", SHAPES)
def test_slots_are_those_of_the_definition(weights, lanes, batch_size):
    mixture = mixture_of(weights, lanes, batch_size)
    expected = slow_slots(weights, lanes, batch_size, NUM_STEPS)
    found = {}
    for d in range(len(weights)):
        positions = np.arange(mixture.start_of(d, NUM_STEPS))
        steps, slots = mixture.slots(d, positions)
        assert steps.tolist() == mixture.steps_of(d, positions).tolist()
        for position, place in enumerate(zip(steps.tolist(), slots.tolist(), strict=True)):
            found[place] = (d, position)
    assert found == expected


@pytest.mark.parametrize("weights, lanes, batch_size", SHAPES)
def test_every_period_holds_the_exact_shares(weights, lanes, batch_size):
    mixture = mixture_of(weights, lanes, batch_size)
    for rounds in (1, 2, 31):
        for d, weight in enumerate(weights):
            assert mixture.positions_before(d, rounds * sum(weights)) == rounds * weight
    starts = [[mixture.start_of(d, step) for d in range(len(weights))] for step in range(50)]
    assert [sum(row) for row in starts] == [step * batch_size for step in range(50)]
    quotas = np.diff(np.array(starts), axis=0)
    for d, weight in enumerate(weights):
        exact = Fraction(weight * batch_size, sum(weights))
        assert (np.abs(quotas[:, d] - float(exact)) < 2).all()
        assert quotas[:, d].max() <= mixture.most_per_step(d)


def test_one_data_set_alone_stands_as_order_v1_says():
    mixture = mixture_of((1,), (6,), 12)
    T = np.arange(12 * 30)
    step, slot = mixture.slots(0, T)
    assert step.tolist() == (T // 12).tolist()
    assert slot.tolist() == ((T % 6) * 2 + (T % 12) // 6).tolist()
    assert mixture.order_id == mixture.orders[0].order_id


def test_identities_tell_mixtures_apart():
    ids = {mixture_of(weights, (2, 2), 8).order_id for weights in ((1, 1), (1, 2), (2, 1))}
    assert len(ids) == 3
    assert lanes_of_parts(64, None, [3, 1]) == [48, 16]
    assert lanes_of_parts(64, 8, [1000, 1]) == [8, 1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for name, counts in (("a", (9, 14, 5)), ("b", (4, 7))):
        write_shards(folder / name, counts)
        build_index(folder / name, split=SplitSpec(fractions={"train": 1.0}))
    return [str(folder / name) for name in "ab"]


def mixed(paths, weights=(3, 1), **settings) -> DataConfig:
    sources = [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]
    defaults = {"mixture": sources, "split": "all", "decode": IMAGES}
    return DataConfig(**defaults, **({"lanes": 4, "interleave": 2, "window": 3} | settings))


def delivered(data, *, first_step=0, num_steps=24, world=1):
    """(step, slot) -> (uid, key, epoch, pixels) from the real streams of all ranks."""
    found, digest = {}, 0
    for rank in range(world):
        with open_stream(
            data, index=open_indexes(data), seed=SEED, batch_size=12, first_step=first_step,
            num_steps=num_steps, rank=rank, world=world,
        ) as stream:  # fmt: skip
            for step, batch in enumerate(stream, first_step):
                rows = zip(
                    batch.uid.tolist(), batch.keys, batch.epoch.tolist(), batch.x, strict=True
                )
                for slot, (uid, key, epoch, x) in enumerate(rows, rank * 12 // world):
                    found[step, slot] = (uid, key, epoch, x.numpy().tobytes())
            digest += stream.account.digest
    return found, digest % 2**64


def test_the_stream_is_the_same_on_any_number_of_processes_and_threads(paths):
    whole, digest = delivered(mixed(paths), num_steps=24)
    for world, threads in ((2, 2), (3, 7), (6, 1)):
        data = mixed(paths, threads=threads, read_threads=threads)
        assert delivered(data, world=world) == (whole, digest)
    counts = Counter(uid >> 48 for uid, *_ in whole.values())
    assert counts == {0: 24 * 9, 1: 24 * 3}
    for ordinal, num_samples in ((0, 28), (1, 11)):
        first_epoch = [e[0] for e in whole.values() if e[0] >> 48 == ordinal and e[2] == 0]
        assert len(first_epoch) == len(set(first_epoch)) == num_samples


def test_a_stream_goes_on_at_any_step_with_other_processes(paths):
    whole, _ = delivered(mixed(paths))
    first, _ = delivered(mixed(paths), num_steps=7, world=2)
    then, _ = delivered(mixed(paths, threads=3), first_step=7, num_steps=6, world=3)
    rest, _ = delivered(mixed(paths), first_step=13, num_steps=11, world=4)
    assert first | then | rest == whole


def test_planning_alone_gives_the_digest_of_a_step(paths):
    data = mixed(paths)
    indexes = open_indexes(data)
    order = order_of(data, indexes, SEED, 12)
    for step in (0, 5, 17):
        _, digest = delivered(data, first_step=step, num_steps=1, world=3)
        assert planned_digest(order, indexes, "all", step) == digest


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": "a", "mixture": [{"path": "b"}]}, "both are given"),
        ({}, "neither is given"),
        ({"shards": "s", "mixture": [{"path": "b"}]}, "shards belongs to path"),
    ],
)
def test_data_is_named_once(settings, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)


def test_a_missing_part_is_named(paths):
    with pytest.raises(UserError, match="nowhere"):
        open_indexes(mixed([paths[0], "nowhere"]))
