"""What the export command leaves is what LatentDataset reads: a real run, data set and export."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.data.index import build_index
from pipeline.export.command import begin, work_through
from pipeline.export.workers import Worker
from pipeline.latents import LatentDataset
from pipeline.latents.formats import READERS
from pipeline.latents.formats.writers import ParquetWriter
from pipeline.training.loading import load_run
from tests.export import world

MODEL = {"bottleneck": {"kind": "gaussian", "size": 3}}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data set has a picture that cannot be read."""
    data = world.make_data(tmp_path_factory.mktemp("data") / "sprites", shards=3)
    world.damage_sample(data, "shard-000001.tar", 5)
    build_index(data, split=world.SPLIT)
    return world.make_run(tmp_path_factory.mktemp("run"), data, MODEL)


def test_a_real_export_is_read(run_dir: Path, tmp_path: Path):
    formats = [{"kind": kind} for kind in READERS]
    assert world.run_export(world.make_config(run_dir, tmp_path, formats=formats)) == 0
    paths = sorted((tmp_path / "data/parquet").iterdir())
    stored = [ParquetWriter().read(path) for path in paths]
    weights = load_run(run_dir).weights_sha256
    for kind in READERS:
        ds = LatentDataset(tmp_path, format=kind, weights_sha256=weights)
        read = f"{len(ds)} rows, mu + logvar [3] float32, read from {kind})"
        assert repr(ds) == f"LatentDataset('{tmp_path}': {read}"
        rows = ds[:]
        assert rows.keys == [key for shard in stored for key in shard.keys]
        assert rows.metadata == [text for shard in stored for text in shard.metadata]
        np.testing.assert_array_equal(rows.labels, np.concatenate([s.labels for s in stored]))
        for field in ("mu", "logvar"):
            expected = np.concatenate([shard.latents[field] for shard in stored])
            np.testing.assert_array_equal(rows.latents[field], expected)
        assert np.flatnonzero(~rows.valid).tolist() == [world.SHARD_ROWS + 5]
        assert ds.by_key("000000020").index == 20
        assert sum(batch.weight.sum() for batch in ds.batches(7)) == len(ds) - 1
    with pytest.raises(UserError, match="latents of another model"):
        LatentDataset(tmp_path, weights_sha256=load_run(run_dir, step=1).weights_sha256)


def test_bfloat16_is_read_as_the_float32_it_rounds(run_dir: Path, tmp_path: Path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        formats = [{"kind": "safetensors"}]
        config = world.make_config(run_dir, tmp_path / dtype, formats=formats, dtype=dtype)
        assert world.run_export(config) == 0
        found[dtype] = LatentDataset(tmp_path / dtype)[:].mu
    assert found["bfloat16"].dtype == np.float32
    assert not (found["bfloat16"].view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=2**-8)


def test_an_export_that_was_stopped_is_unfinished(run_dir: Path, tmp_path: Path):
    stops = iter([False, True])
    prepared, _ = begin(world.make_config(run_dir, tmp_path), Worker())
    assert work_through(prepared, Worker(), lambda: next(stops)) == 3
    with pytest.raises(UserError, match="holds an unfinished export: _SUCCESS is not there"):
        LatentDataset(tmp_path)
