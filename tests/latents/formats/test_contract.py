"""Every writer: deterministic, gives back what it was given, and others can read it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.latents.formats.writers import (
    NO_LABEL,
    BaseWriter,
    Column,
    Dtype,
    ParquetWriter,
    Rows,
    TarWriter,
    Writer,
)
from tests.processes import ROOT

KINDS = get_args(get_args(Writer)[0])
SHAPES = [(3,), (2, 3, 4), (1, 1, 1)]


KINDS_AND_DTYPES = [
    pytest.param(kind, dtype, id=f"{kind().kind}-{dtype}")
    for kind in KINDS
    for dtype in kind().dtypes
]


def make_rows(
    shape: tuple[int, ...] = (3,), dtype: Dtype = "float32", *, n: int = 8, notes: bool = True
) -> Rows:
    generator = np.random.default_rng(1)
    latents: dict[str, np.ndarray] = {}
    for name in ("mu", "logvar"):
        values = torch.from_numpy(generator.normal(size=(n, *shape))).to(getattr(torch, dtype))
        latents[name] = (values.float() if dtype == "bfloat16" else values).numpy()
    valid = np.ones(n, np.bool_)
    valid[2] = False
    for values in latents.values():
        values[2] = 0
    labels = np.arange(n) % 3 if notes else np.full(n, NO_LABEL)
    texts = [json.dumps({"x": i / 8, "name": f"é{i}"}, ensure_ascii=False) for i in range(n)]
    keys = [f"cats/{i:03d}" for i in range(n)]
    rows = np.arange(n) * 2
    metadata = texts if notes else [None] * n
    plain = [f"line {i}\n\tä" if i % 3 else None for i in range(n)] if notes else [None] * n
    is_bfloat16 = dtype == "bfloat16"
    return Rows("shard-7", keys, rows, valid, labels, metadata, plain, latents, is_bfloat16)


def files_of(writer: BaseWriter, path: Path) -> list[Path]:
    return [path.with_suffix(suffix) for suffix in writer.suffixes]


def assert_same(one: Rows, other: Rows) -> None:
    assert list(one.keys) == list(other.keys)
    assert list(one.metadata) == list(other.metadata)
    assert list(one.texts) == list(other.texts)
    assert one.bfloat16 == other.bfloat16
    for name in ("rows", "valid", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert list(one.latents) == list(other.latents)
    for name, values in one.latents.items():
        assert other.latents[name].dtype == values.dtype
        np.testing.assert_array_equal(other.latents[name], values)


@pytest.mark.parametrize("kind, dtype", KINDS_AND_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_read_gives_back_what_was_written(
    kind: type[BaseWriter], shape: tuple[int, ...], dtype: Dtype, tmp_path: Path
):
    writer, rows = kind(), make_rows(shape, dtype)
    path = tmp_path / f"shard-7{writer.suffix}"
    writer.write(path, rows)
    assert_same(writer.read(path), rows)
    assert writer.read(path).shard == rows.shard
    assert writer.suffixes[0] == writer.suffix
    assert set(tmp_path.iterdir()) == set(files_of(writer, path))


FIELD_SETS = [
    ("mu", "logvar", "mu_hflip", "logvar_hflip"),
    ("mu", "mu_hflip"),
    ("z",),
    ("z", "z_hflip"),
]


def with_fields(rows: Rows, names: tuple[str, ...]) -> Rows:
    """The rows with other latents, each field different."""
    values = rows.latents["mu"]
    return replace(rows, latents={name: values * 2.0**i for i, name in enumerate(names)})


@pytest.mark.parametrize("kind, dtype", KINDS_AND_DTYPES)
@pytest.mark.parametrize("names", FIELD_SETS, ids="-".join)
def test_samples_and_mirrored_views_come_back(
    kind: type[BaseWriter], names: tuple[str, ...], dtype: Dtype, tmp_path: Path
):
    rows = with_fields(make_rows((2, 3), dtype), names)
    contents = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}{kind().suffix}"
        kind().write(path, rows)
        assert_same(kind().read(path), rows)
        contents.append([file.read_bytes() for file in files_of(kind(), path)])
    assert contents[0] == contents[1]


COLUMNS = {
    "width": Column("int64", [2**62 + i for i in range(7)] + [None]),
    "score": Column("float64", [0.1 * i for i in range(7)] + [None]),
    "tag": Column("string", [f"ä{i % 2}" for i in range(7)] + [None]),
    "is_new": Column("bool", [i % 2 == 0 for i in range(7)] + [None]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_come_back_where_the_format_has_columns(kind: type[BaseWriter], tmp_path: Path):
    rows = replace(make_rows(), columns=COLUMNS)
    contents = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}{kind().suffix}"
        kind().write(path, rows)
        assert_same(kind().read(path), rows)
        contents.append([file.read_bytes() for file in files_of(kind(), path)])
    assert contents[0] == contents[1]
    expected = COLUMNS if kind().kind in ("parquet", "npy") else {}
    assert kind().read(path).columns == expected


@pytest.mark.parametrize("kind", KINDS)
def test_equal_keys_that_follow_each_other_stay_rows_of_their_own(
    kind: type[BaseWriter], tmp_path: Path
):
    """As when a split leaves out what stands between them."""
    rows = make_rows()
    rows = replace(rows, keys=["a", "a", "b", "b", "b", "c", "a", "a"])
    writer = kind()
    writer.write(tmp_path / f"x{writer.suffix}", rows)
    found = writer.read(tmp_path / f"x{writer.suffix}")
    assert list(found.keys) == rows.keys
    np.testing.assert_array_equal(found.latents["mu"], rows.latents["mu"])


@pytest.mark.parametrize("kind", KINDS)
def test_files_from_before_there_were_texts_are_read(kind: type[BaseWriter]):
    (path,) = (ROOT / "tests/golden/rows-without-text" / kind().kind).glob(f"*{kind().suffix}")
    rows = make_rows((2, 3))
    assert_same(kind().read(path), replace(rows, texts=[None] * len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_and_a_stem_with_dots(kind: type[BaseWriter], tmp_path: Path):
    path = tmp_path / f"part.0.of.9{kind().suffix}"
    rows = replace(make_rows(n=3), shard="part.0.of.9")
    one = Rows(
        *(rows.shard, rows.keys[:1], rows.rows[:1], rows.valid[:1], rows.labels[:1]),
        *(rows.metadata[:1], rows.texts[:1]),
        {field: values[:1] for field, values in rows.latents.items()},
    )
    kind().write(path, one)
    assert_same(kind().read(path), one)
    assert kind().read(path).shard == "part.0.of.9"


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


@pytest.mark.parametrize("kind, dtype", KINDS_AND_DTYPES)
def test_same_rows_give_the_same_bytes(kind: type[BaseWriter], dtype: Dtype, tmp_path: Path):
    contents = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}{kind().suffix}"
        kind().write(path, make_rows(dtype=dtype))
        contents.append([file.read_bytes() for file in files_of(kind(), path)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", KINDS)
def test_existing_files_are_not_overwritten(kind: type[BaseWriter], tmp_path: Path):
    for number, suffix in enumerate(kind().suffixes):
        path = tmp_path / f"{number}{kind().suffix}"
        path.with_suffix(suffix).write_text("mine")
        with pytest.raises(FileExistsError):
            kind().write(path, make_rows())
        assert path.with_suffix(suffix).read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, None, "gone"])
def test_damaged_files_are_a_value_error(
    kind: type[BaseWriter], content: bytes | str | None, tmp_path: Path
):
    for number, suffix in enumerate(kind().suffixes):
        path = tmp_path / f"{number}{kind().suffix}"
        kind().write(path, make_rows())
        damaged = path.with_suffix(suffix)
        whole = damaged.read_bytes()
        if content == "gone":
            damaged.unlink()
        else:
            damaged.write_bytes(whole[: min(1300, len(whole) - 5)] if content is None else content)
        with pytest.raises(ValueError, match=rf"{damaged.name} cannot be read"):
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
        "columns": {},
    }


@pytest.mark.parametrize("text_bytes, shape", [(10, (4, 64, 64)), (100_000, (3,))])
def test_parquet_row_groups_are_equal_and_neither_small_nor_large(
    text_bytes: int, shape: tuple[int, ...], tmp_path: Path
):
    """Of about 70 MB, whether the latents or the texts are large; and no small rest at the end."""
    rows = make_rows(shape, n=512 if text_bytes < 100 else 700)
    generator = np.random.default_rng(2)
    texts = [json.dumps(generator.bytes(text_bytes // 2).hex()) for _ in rows.keys]
    ParquetWriter().write(tmp_path / "s.parquet", replace(rows, metadata=texts))
    with pq.ParquetFile(tmp_path / "s.parquet") as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    assert len(groups) == 3
    assert all(8 << 20 <= group.total_byte_size <= 64 << 20 for group in groups)
    assert max(group.num_rows for group in groups) - groups[-1].num_rows <= len(groups)


def read_with_others(tmp_path: Path, rows: Rows) -> dict[str, list[dict]]:
    tar, parquet = tmp_path / "shard-7.tar", tmp_path / "shard-7.parquet"
    TarWriter().write(tar, rows)
    ParquetWriter().write(parquet, rows)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests/latents/formats" / "others.py"
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
    rows = replace(make_rows(shape, dtype), columns=COLUMNS)
    mirrored = {f"{name}_hflip": -values for name, values in rows.latents.items()}
    rows.latents.update(mirrored)
    found = read_with_others(tmp_path, rows)
    assert set(found) == {"webdataset", "datasets tar", "datasets parquet", "pyarrow"}
    for reader, samples in found.items():
        assert [sample["key"] for sample in samples] == list(rows.keys), reader
        assert [sample["row"] for sample in samples] == rows.rows.tolist(), reader
        assert [sample["valid"] for sample in samples] == rows.valid.tolist(), reader
        assert [sample["label"] for sample in samples] == rows.labels.tolist(), reader
        # Every sample of a tar has the same members.
        assert [sample["text"] or None for sample in samples] == list(rows.texts), reader
        if "tar" not in reader and reader != "webdataset":
            for name, column in COLUMNS.items():
                assert [sample[name] for sample in samples] == list(column.values), reader
        for place, sample in enumerate(samples):
            for name in rows.latents:
                assert sample[name] == rows.latents[name][place].tolist(), reader
            metadata = sample["metadata"]
            parsed = json.loads(metadata) if isinstance(metadata, str) else metadata
            assert parsed == json.loads(rows.metadata[place] or ""), reader
    assert found["webdataset"][0]["dtype"] == dtype
    assert dtype in found["datasets parquet"][0]["dtype"]
    assert f"length={shape[0]}" in found["datasets parquet"][0]["dtype"]
