"""npy: what others read in the matrix and its sidecar, and that the two belong together."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.latents.formats.writers import COLUMNS, NpyWriter, Rows
from tests.latents.formats.embedding import embedding_reader
from tests.latents.formats.test_contract import make_rows
from tests.processes import ROOT

__all__ = ["embedding_reader"]  # a fixture

STEMS = ["cats/shard-0", "cats/shard-00", "shard-7"]  # in the order of embedding-reader


def write_folder(folder: Path, shape: tuple[int, ...] = (2, 3), dtype: str = "float32") -> Rows:
    """Write one set of rows in three files; they stand for three tasks."""
    rows = make_rows(shape, dtype, n=23)
    for number, stem in enumerate(STEMS):
        part = slice(number * 8, number * 8 + 8)
        path = folder / f"{stem}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = (rows.keys, rows.rows, rows.valid, rows.labels, rows.metadata, rows.texts)
        latents = {field: values[part] for field, values in rows.latents.items()}
        NpyWriter().write(path, Rows(stem, *(column[part] for column in columns), latents))
    return rows


def read_with(reader: str, folder: Path, *path: Path) -> list[dict]:
    """What a reader sees below `folder`; `path`: where else it is imported from."""
    result = subprocess.run(
        [sys.executable, ROOT / "tests/latents/formats" / "indexers.py", reader, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_maps_a_matrix(dtype: str, tmp_path: Path):
    rows = make_rows((2, 3, 4), dtype)
    NpyWriter().write(tmp_path / "s.npy", rows)
    matrix = np.load(tmp_path / "s.npy", mmap_mode="r")
    assert isinstance(matrix, np.memmap)
    assert (matrix.shape, matrix.dtype) == ((8, 24), np.dtype(dtype))
    np.testing.assert_array_equal(matrix, rows.latents["mu"].reshape(8, 24))


def test_twin_holds_all_but_the_means(tmp_path: Path):
    rows = make_rows((2, 3, 4), "float16")
    NpyWriter().write(tmp_path / "s.npy", rows)
    with pq.ParquetFile(tmp_path / "s.parquet") as file:
        table = file.read()
    assert table.column_names == [*COLUMNS, "logvar"]
    assert table["key"].to_pylist() == rows.keys
    assert table["valid"].to_pylist() == rows.valid.tolist()
    assert table["logvar"].to_pylist() == rows.latents["logvar"].tolist()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert set(features) == set(table.column_names)
    ours = json.loads(table.schema.metadata[b"latentmill"])
    assert ours["latent_shape"] == [2, 3, 4]


def test_the_matrix_holds_samples_where_they_are_stored(tmp_path: Path):
    rows = make_rows((2, 3))
    z, mirrored = rows.latents["mu"], rows.latents["logvar"]
    NpyWriter().write(tmp_path / "s.npy", replace(rows, latents={"z": z, "z_hflip": mirrored}))
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), z.reshape(8, 6))
    with pq.ParquetFile(tmp_path / "s.parquet") as file:
        table = file.read()
    assert table.column_names == [*COLUMNS, "z_hflip"]
    assert table["z_hflip"].to_pylist() == mirrored.tolist()
    assert table["text"].to_pylist() == rows.texts


def test_matrix_and_twin_that_do_not_fit(tmp_path: Path):
    NpyWriter().write(tmp_path / "long.npy", make_rows(n=8))
    NpyWriter().write(tmp_path / "short.npy", make_rows(n=7))
    (tmp_path / "short.parquet").replace(tmp_path / "long.parquet")
    with pytest.raises(ValueError, match=r"shape \(8, 3\).* belongs to \(7, 3\)"):
        NpyWriter().read(tmp_path / "long.npy")


@pytest.mark.slow
@pytest.mark.parametrize("shape, dtype", [((3,), "float16"), ((2, 3), "float32")])
def test_embedding_reader_joins_rows_across_files(
    embedding_reader: Path, shape: tuple[int, ...], dtype: str, tmp_path: Path
):
    rows = write_folder(tmp_path, shape, dtype)
    found = read_with("embedding_reader", tmp_path, embedding_reader)
    assert [sample["key"] for sample in found] == list(rows.keys)
    assert [sample["row"] for sample in found] == rows.rows.tolist()
    assert [sample["valid"] for sample in found] == rows.valid.tolist()
    assert [sample["label"] for sample in found] == rows.labels.tolist()
    assert [sample["metadata"] for sample in found] == list(rows.metadata)
    matrix = rows.latents["mu"].reshape(len(rows), -1)
    np.testing.assert_array_equal(np.array([sample["mu"] for sample in found], dtype), matrix)


def test_faiss_finds_every_row_and_its_neighbour(tmp_path: Path):
    rows = write_folder(tmp_path)
    found = read_with("faiss", tmp_path)
    matrix = rows.latents["mu"].reshape(len(rows), -1).astype(np.float64)
    distances = ((matrix[:, None] - matrix) ** 2).sum(axis=2)
    expected = np.argsort(distances, axis=1)[:, :2]
    assert [sample["neighbours"] for sample in found] == expected.tolist()
    assert expected[:, 0].tolist() == list(range(len(rows)))
