"""Exports read by public libraries: they return the rows in their shape and order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.common.errors import DONE
from pipeline.latents.formats import READERS
from pipeline.latents.formats.writers import Rows
from tests.export.test_export import encode_slowly
from tests.export.world import NUM_SHARDS, make_config, run_export, source_keys
from tests.latents.exports import make_rows, write_export
from tests.latents.formats.embedding import embedding_reader
from tests.latents.formats.test_npy import read_with
from tests.processes import ROOT

__all__ = ["embedding_reader"]  # a fixture

SHAPE = (2, 3, 4)


@pytest.fixture(scope="module")
def shards() -> list[Rows]:
    """Feature maps, some rows of which could not be encoded."""
    return [make_rows(number, count, SHAPE) for number, count in enumerate((9, 1, 14))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shards: list[Rows]) -> Path:
    """The export of these rows in all formats."""
    return write_export(tmp_path_factory.mktemp("made") / "out", shards, list(READERS))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> Path:
    """A model's export of the sprites in all formats."""
    out = tmp_path_factory.mktemp("encoded") / "out"
    formats = [{"kind": kind} for kind in READERS]
    assert run_export(make_config(run_dir, out, formats=formats)) == DONE
    return out


def keys_of(shards: list[Rows]) -> list[str]:
    return [key for rows in shards for key in rows.keys]


def mu_of(shards: list[Rows]) -> np.ndarray:
    return np.concatenate([rows.latents["mu"] for rows in shards])


@pytest.mark.slow
def test_pyarrow_datasets_and_webdataset(made: Path, shards: list[Rows], tmp_path: Path):
    """`load_dataset` gives each latent back as [C, H, W], not as one long list."""
    rows = shards[2]
    files = [made / f"data/{kind}/{rows.shard}.{kind}" for kind in ("tar", "parquet")]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/latents/formats/others.py", *files],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"webdataset", "datasets tar", "datasets parquet", "pyarrow"}
    for reader, samples in found.items():
        assert [sample["key"] for sample in samples] == list(rows.keys), reader
        assert [sample["valid"] for sample in samples] == rows.valid.tolist(), reader
        for field, values in rows.latents.items():
            theirs = np.array([sample[field] for sample in samples], np.float32)
            if reader == "pyarrow":  # knows lists alone
                theirs = theirs.reshape(len(rows), *SHAPE)
            np.testing.assert_array_equal(theirs, values, err_msg=reader)


def test_safetensors(made: Path, shards: list[Rows]):
    for rows in shards:
        tensors = load_file(made / f"data/safetensors/{rows.shard}.safetensors")
        for field, values in rows.latents.items():
            np.testing.assert_array_equal(tensors[field], values)


def test_faiss(made: Path, shards: list[Rows]):
    found = read_with("faiss", made / "data/npy")
    matrix = mu_of(shards).reshape(len(found), -1).astype(np.float64)
    distances = ((matrix[:, None] - matrix) ** 2).sum(axis=2)
    for row in np.flatnonzero(np.concatenate([rows.valid for rows in shards])):
        assert found[row]["neighbours"] == np.argsort(distances[row])[:2].tolist()


@pytest.mark.slow
def test_embedding_reader_of_feature_maps(made: Path, shards: list[Rows], embedding_reader: Path):
    found = read_with("embedding_reader", made / "data/npy", embedding_reader)
    assert [sample["key"] for sample in found] == keys_of(shards)
    theirs = np.array([sample["mu"] for sample in found], np.float32)
    np.testing.assert_array_equal(theirs.reshape(-1, *SHAPE), mu_of(shards))


@pytest.mark.slow
def test_embedding_reader_of_a_models_export(
    encoded: Path, run_dir: Path, data: Path, embedding_reader: Path
):
    found = read_with("embedding_reader", encoded / "data/npy", embedding_reader)
    assert [sample["key"] for sample in found] == source_keys(data)
    theirs = np.array([sample["mu"] for sample in found], np.float32)
    matrices = [np.load(path) for path in sorted((encoded / "data/npy").glob("*.npy"))]
    assert len(matrices) == NUM_SHARDS
    np.testing.assert_array_equal(theirs, np.concatenate(matrices))
    expected = encode_slowly(run_dir, data)
    for sample, mu in zip(found, theirs, strict=True):
        np.testing.assert_allclose(mu, expected[sample["key"]][0], atol=1e-5)
