"""Random access on 200,000 rows and the rate of batches, measured."""

import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.latents import LatentDataset
from tests.latents.exports import make_rows, write_export

NUM_SHARDS, SHARD_ROWS = 40, 5000
NUM_ROWS = NUM_SHARDS * SHARD_ROWS
KINDS = (
    "npy",
    "safetensors",
    "parquet",
    pytest.param("tar", marks=pytest.mark.soak),  # a minute to write
)


@pytest.fixture(scope="module", params=KINDS)
def ds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    shards = [make_rows(n, SHARD_ROWS, (8,)) for n in range(NUM_SHARDS)]
    out: Path = tmp_path_factory.mktemp("large")
    return LatentDataset(write_export(out, shards, [request.param]))


@pytest.mark.alone
def test_random_access_by_key_takes_less_than_5_ms(ds: LatentDataset):
    assert len(ds) == NUM_ROWS
    seconds = []
    for number in np.random.default_rng(0).integers(0, NUM_ROWS, 200).tolist():
        key = f"{number // SHARD_ROWS:04d}/{number % SHARD_ROWS:05d}"
        start = time.perf_counter()
        row = ds.by_key(key)
        seconds.append(time.perf_counter() - start)
        assert (row.index, row.key) == (number, key)
    median, slowest = np.median(seconds) * 1e3, max(seconds) * 1e3
    print(
        f"\n{ds.format}: by_key on {NUM_ROWS:,} rows: median {median:.2f} ms, {slowest:.1f} at most"
    )
    assert median < 5


@pytest.mark.alone
def test_an_epoch_of_batches_is_read_at_a_rate_that_feeds_a_model(ds: LatentDataset):
    start = time.perf_counter()
    num_rows = sum(len(batch) for batch in ds.batches(256))
    rate = num_rows / (time.perf_counter() - start)
    print(f"\n{ds.format}: {rate:,.0f} rows/s in batches of 256")
    assert rate > 5000  # a machine that is busy with other things included
