"""Every writer: deterministic, gives back what it was given, and others can read it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.writers import NO_LABEL, BaseWriter, ParquetWriter, Rows, TarWriter, Writer
from tests.processes import ROOT

KINDS = get_args(get_args(Writer)[0])
SHAPES = [(3,), (2, 3, 4)]
DTYPES = ["float32", "float16"]


def make_rows(
    shape: tuple[int, ...] = (3,), dtype: str = "float32", *, n: int = 8, notes: bool = True
) -> Rows:
    generator = np.random.default_rng(1)
    latents = {name: generator.normal(size=(n, *shape)).astype(dtype) for name in ("mu", "logvar")}
    valid = np.ones(n, np.bool_)
    valid[2] = False
    for values in latents.values():
        values[2] = 0
    labels = np.arange(n) % 3 if notes else np.full(n, NO_LABEL)
    texts = [json.dumps({"x": i / 8, "name": f"é{i}"}, ensure_ascii=False) for i in range(n)]
    keys = [f"cats/{i:03d}" for i in range(n)]
    rows = np.arange(n) * 2
    return Rows("shard-7", keys, rows, valid, labels, texts if notes else [None] * n, latents)


def assert_same(one: Rows, other: Rows) -> None:
    assert list(one.keys) == list(other.keys)
    assert list(one.metadata) == list(other.metadata)
    for name in ("rows", "valid", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert list(one.latents) == list(other.latents)
    for name, values in one.latents.items():
        assert other.latents[name].dtype == values.dtype
        np.testing.assert_array_equal(other.latents[name], values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_read_gives_back_what_was_written(
    kind: type[BaseWriter], shape: tuple[int, ...], dtype: str, tmp_path: Path
):
    writer, rows = kind(), make_rows(shape, dtype)
    path = tmp_path / f"shard-7{writer.suffix}"
    writer.write(path, rows)
    assert_same(writer.read(path), rows)
    assert writer.read(path).shard == rows.shard


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_label_metadata_or_variance(kind: type[BaseWriter], tmp_path: Path):
    rows = make_rows(notes=False)
    del rows.latents["logvar"]
    path = tmp_path / f"s{kind().suffix}"
    kind().write(path, rows)
    assert_same(kind().read(path), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_which_some_have_label_and_metadata(kind: type[BaseWriter], tmp_path: Path):
    rows = make_rows()
    labels, texts = rows.labels.copy(), list(rows.metadata)
    labels[1], texts[3] = NO_LABEL, None
    mixed = Rows(**vars(rows) | {"labels": labels, "metadata": texts})
    path = tmp_path / f"s{kind().suffix}"
    kind().write(path, mixed)
    assert_same(kind().read(path), mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_same_rows_give_the_same_bytes(kind: type[BaseWriter], tmp_path: Path):
    contents = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}{kind().suffix}"
        kind().write(path, make_rows())
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", KINDS)
def test_existing_files_are_not_overwritten(kind: type[BaseWriter], tmp_path: Path):
    path = tmp_path / f"s{kind().suffix}"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        kind().write(path, make_rows())
    assert path.read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, None])
def test_damaged_files_are_a_value_error(
    kind: type[BaseWriter], content: bytes | None, tmp_path: Path
):
    path = tmp_path / f"s{kind().suffix}"
    kind().write(path, make_rows())
    path.write_bytes(path.read_bytes()[:1300] if content is None else content)
    with pytest.raises(ValueError, match="cannot be read"):
        kind().read(path)


def test_parquet_latents_are_stored_plainly(tmp_path: Path):
    ParquetWriter().write(tmp_path / "s.parquet", make_rows((2, 3, 4), "float16"))
    with pq.ParquetFile(tmp_path / "s.parquet") as file:
        columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
        metadata = json.loads(file.schema_arrow.metadata[b"latentmill"])
    latents = [column for column in columns if column.path_in_schema.startswith(("mu", "logvar"))]
    assert len(latents) == 2
    for column in latents:
        assert column.compression == "UNCOMPRESSED"
        assert not column.is_stats_set
        assert set(column.encodings) == {"PLAIN", "RLE"}
    assert metadata == {
        "version": 1,
        "latent_shape": [2, 3, 4],
        "dtype": "float16",
        "fields": ["mu", "logvar"],
    }


def read_with_others(tmp_path: Path, rows: Rows) -> dict[str, list[dict]]:
    tar, parquet = tmp_path / "shard-7.tar", tmp_path / "shard-7.parquet"
    TarWriter().write(tar, rows)
    ParquetWriter().write(parquet, rows)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "writers" / "others.py"
    result = subprocess.run(
        [sys.executable, script, tar, parquet],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape, dtype", [((3,), "float16"), ((2, 3, 4), "float32")])
def test_others_read_the_files(shape: tuple[int, ...], dtype: str, tmp_path: Path):
    rows = make_rows(shape, dtype)
    found = read_with_others(tmp_path, rows)
    assert set(found) == {"webdataset", "datasets tar", "datasets parquet", "pyarrow"}
    for reader, samples in found.items():
        assert [sample["key"] for sample in samples] == list(rows.keys), reader
        assert [sample["row"] for sample in samples] == rows.rows.tolist(), reader
        assert [sample["valid"] for sample in samples] == rows.valid.tolist(), reader
        assert [sample["label"] for sample in samples] == rows.labels.tolist(), reader
        for place, sample in enumerate(samples):
            for name in ("mu", "logvar"):
                assert sample[name] == rows.latents[name][place].tolist(), reader
            metadata = sample["metadata"]
            parsed = json.loads(metadata) if isinstance(metadata, str) else metadata
            assert parsed == json.loads(rows.metadata[place] or ""), reader
    assert found["webdataset"][0]["dtype"] == dtype
    assert dtype in found["datasets parquet"][0]["dtype"]
    assert f"length={shape[0]}" in found["datasets parquet"][0]["dtype"]
