"""Batches: every row once, the same for any ranks, workers and restarts; order-v1 decides."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.common.errors import UserError
from pipeline.data.order import Order
from pipeline.latents import LatentDataset, LatentRows
from tests.latents.exports import make_rows, write_export

COUNTS = (40, 0, 7, 93, 60, 1)
NUM_ROWS = sum(COUNTS)
BATCH = 24
STEPS = 9  # of which the last holds 9 rows and 15 repeats


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    out = tmp_path_factory.mktemp("export")
    shards = [make_rows(n, count, notes=False) for n, count in enumerate(COUNTS) if count]
    return LatentDataset(write_export(out, shards, ["parquet"]))


def together(parts: list[list[LatentRows]]) -> list[list[int]]:
    """The row numbers of each step, over all ranks."""
    return [
        np.concatenate([part.index for part in step]).tolist() for step in zip(*parts, strict=True)
    ]


def of_world(ds: LatentDataset, world: int, **options) -> list[list[int]]:
    return together([list(ds.batches(BATCH, rank=r, world=world, **options)) for r in range(world)])


def test_every_row_comes_once_per_epoch(ds: LatentDataset):
    orders = set()
    for epoch in range(3):
        batches = list(ds.batches(BATCH, epoch=epoch))
        assert len(batches) == STEPS == ds.num_steps(BATCH)
        assert {len(batch) for batch in batches} == {BATCH}
        rows = np.concatenate([batch.index for batch in batches])
        weight = np.concatenate([batch.weight for batch in batches])
        assert sorted(rows[weight == 1].tolist()) == list(range(NUM_ROWS))
        assert (weight == 0).sum() == STEPS * BATCH - NUM_ROWS
        orders.add(tuple(rows.tolist()))
    assert len(orders) == 3


def test_rows_of_a_batch_are_the_rows_of_their_numbers(ds: LatentDataset):
    for batch in ds.batches(BATCH, seed=5):
        same = ds[batch.index]
        assert batch.keys == same.keys
        np.testing.assert_array_equal(batch.mu, same.mu)
        np.testing.assert_array_equal(batch.labels, same.labels)


@pytest.mark.parametrize("world", [2, 3, 4, 24])
@pytest.mark.parametrize("tail", ["mask", "drop"])
def test_ranks_together_read_what_one_reads(ds: LatentDataset, world: int, tail: str):
    alone = of_world(ds, 1, tail=tail, epoch=1)
    assert of_world(ds, world, tail=tail, epoch=1) == alone
    assert len(alone) == ds.num_steps(BATCH, tail=tail) == (STEPS if tail == "mask" else STEPS - 1)


def test_a_resume_with_other_ranks_goes_on(ds: LatentDataset):
    whole = of_world(ds, 1, seed=7, epoch=2)
    for start in range(STEPS + 1):
        for world in (1, 2, 3):
            assert of_world(ds, world, seed=7, epoch=2, start=start) == whole[start:]


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
def test_workers_take_turns(ds: LatentDataset, workers: int):
    whole = [batch.index.tolist() for batch in ds.batches(BATCH, start=2, world=2, rank=1)]
    of_each = [
        [
            batch.index.tolist()
            for batch in ds.batches(BATCH, start=2, world=2, rank=1, worker=worker, workers=workers)
        ]
        for worker in range(workers)
    ]
    assert [of_each[step % workers][step // workers] for step in range(STEPS - 2)] == whole


class Latents(IterableDataset):
    """What a torch user writes."""

    def __init__(self, ds: LatentDataset) -> None:
        self.ds = ds

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for batch in self.ds.batches(BATCH, seed=1, worker=worker, workers=workers):
            yield {"mu": torch.from_numpy(batch.mu), "index": torch.from_numpy(batch.index)}


@pytest.mark.parametrize(
    "workers, method",
    [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_dataloader_gives_the_steps_in_order(ds: LatentDataset, workers: int, method: str | None):
    loader = DataLoader(
        Latents(ds), batch_size=None, num_workers=workers, multiprocessing_context=method
    )
    found = [(batch["index"].tolist(), batch["mu"].numpy()) for batch in loader]
    expected = list(ds.batches(BATCH, seed=1))
    assert [index for index, _ in found] == [batch.index.tolist() for batch in expected]
    for (_, mu), batch in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mu, batch.mu)


def test_the_order_is_order_v1(ds: LatentDataset):
    options = {"lanes": 4, "interleave": 2, "window": 16}
    counts = [count for count in COUNTS if count]
    order = Order(counts, seed=3, batch_size=BATCH, tail="mask", **options)
    first = np.cumsum([0, *counts])
    for epoch in range(2):
        for step, batch in enumerate(ds.batches(BATCH, seed=3, epoch=epoch, **options)):
            shard, row = order.samples(order.positions(epoch * STEPS + step))
            assert batch.index.tolist() == (first[shard] + row).tolist()


def test_seed_lanes_interleave_and_window_change_the_order(ds: LatentDataset):
    settings = [{}, {"seed": 1}, {"lanes": 2}, {"interleave": 1}, {"window": 8}, {"epoch": 1}]
    orders = [str(of_world(ds, 1, **options)) for options in settings]
    assert len(set(orders)) == len(settings)


def test_rows_are_mixed(ds: LatentDataset):
    shards = [
        len(np.unique(np.searchsorted(np.cumsum([c for c in COUNTS if c]), batch.index, "right")))
        for batch in ds.batches(BATCH)
    ]
    assert min(shards[:-1]) >= 3


def test_a_failed_row_has_weight_zero(tmp_path: Path):
    ds = LatentDataset(write_export(tmp_path, [make_rows(0, 32)], ["tar"]))
    (batch,) = ds.batches(32)
    assert Counter(batch.weight.tolist()) == {1.0: 27, 0.0: 5}
    np.testing.assert_array_equal(batch.weight == 1, batch.valid)


def test_noise_depends_on_the_row_alone(ds: LatentDataset):
    whole = ds[:].sample(seed=4, epoch=2)
    for batch in ds.batches(BATCH, rank=1, world=3):
        np.testing.assert_array_equal(batch.sample(seed=4, epoch=2), whole[batch.index])
    others = [ds[:].sample(seed=4, epoch=3), ds[:].sample(seed=5, epoch=2)]
    assert all(abs(other - whole).max() > 1 for other in others)
    rows = ds[:]
    eps = (whole - rows.mu) / np.exp(0.5 * rows.logvar)
    assert abs(eps.mean()) < 4 / np.sqrt(eps.size)
    assert abs(eps.std() - 1) < 4 / np.sqrt(2 * eps.size)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"world": 5}, "batch_size = 24 .* positive multiple of world = 5: such as 25"),
        ({"batch_size": 0}, "batch_size = 0 .* positive multiple of world = 1: such as 1"),
        ({"rank": 2, "world": 2}, "rank = 2 does not fit world = 2: 0 <= rank < world"),
        ({"rank": -1}, "rank = -1 does not fit world = 1"),
        ({"worker": 1}, "worker = 1 does not fit workers = 1: 0 <= worker < workers"),
        ({"start": 10}, "epoch = 0, start = 10: .* one has 9 steps of batch_size = 24"),
        ({"start": -1}, "epoch = 0, start = -1"),
        ({"epoch": -1}, "epoch = -1"),
        ({"lanes": 5}, "lanes = 5 does not divide"),
        ({"lanes": 0}, "lanes = 0, but must be at least 1"),
        ({"window": 0}, "window = 0, but must be at least 1"),
        ({"interleave": 0}, "interleave = 0, but must be at least 1"),
        ({"batch_size": 300, "tail": "drop"}, "no batch is left"),
        ({"tail": "carry"}, "tail is 'carry', but must be mask or drop"),
    ],
)
def test_numbers_that_do_not_fit(ds: LatentDataset, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ds.batches(**{"batch_size": BATCH} | options)
