"""Random access on 200,000 rows, measured; what is cold is counted, too."""

import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.latents import LatentDataset
from tests.latents.exports import make_rows, write_export

NUM_SHARDS, SHARD_ROWS = 40, 5000
NUM_ROWS = NUM_SHARDS * SHARD_ROWS
KINDS = ("npy", "safetensors", "parquet", "tar")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [make_rows(n, SHARD_ROWS, (8,)) for n in range(NUM_SHARDS)]
    return write_export(tmp_path_factory.mktemp("large"), shards, KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_access_by_key_takes_less_than_5_ms(kind: str, out: Path):
    ds = LatentDataset(out, format=kind)
    assert len(ds) == NUM_ROWS
    numbers = np.random.default_rng(0).integers(0, NUM_ROWS, 200).tolist()
    seconds = []
    for number in numbers:
        key = f"{number // SHARD_ROWS:04d}/{number % SHARD_ROWS:05d}"
        start = time.perf_counter()
        row = ds.by_key(key)
        seconds.append(time.perf_counter() - start)
        assert (row.index, row.key) == (number, key)
    median, slowest = np.median(seconds) * 1e3, max(seconds) * 1e3
    print(f"{kind}: by_key on {NUM_ROWS:,} rows: median {median:.2f} ms, slowest {slowest:.1f} ms")
    assert median < 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_of_batches(kind: str, out: Path):
    """No bound that a busy machine could break but a generous one: figures are printed."""
    ds = LatentDataset(out, format=kind)
    start = time.perf_counter()
    num_rows = sum(int(batch.weight.size) for batch in ds.batches(256))
    rate = num_rows / (time.perf_counter() - start)
    print(f"{kind}: {rate:,.0f} rows/s in batches of 256")
    assert rate > 2000
