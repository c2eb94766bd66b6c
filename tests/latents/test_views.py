"""Samples, mirrored views, texts and columns of the JSON, read in every format."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.latents import LatentDataset
from pipeline.latents.fields import FieldType, field_values
from pipeline.latents.files import LocalFiles
from pipeline.latents.formats import READERS
from pipeline.latents.formats.reading import COLUMNS, LABEL_TEXT, Layout
from pipeline.latents.formats.writers import COLUMNS as WRITTEN_COLUMNS
from pipeline.latents.formats.writers import FIELDS, Column, ColumnType
from pipeline.latents.noise import sample
from pipeline.latents.rows import field_of
from tests.latents.exports import make_rows, write_export
from tests.processes import ROOT

COUNTS = (11, 1, 30)
VIEWS = ("mu", "logvar", "mu_hflip", "logvar_hflip")

each_kind = pytest.mark.parametrize("kind", list(READERS))


def small(out: Path, kind: str, **options) -> list:
    shards = [make_rows(n, count, (2, 3), **options) for n, count in enumerate(COUNTS)]
    write_export(out, shards, [kind])
    return shards


def test_names_are_those_of_the_writers():
    assert set(FIELDS) == {
        field_of(n, v) for n in ("mu", "logvar", "z") for v in ("identity", "hflip")
    }
    assert set(COLUMNS) - {LABEL_TEXT} <= set(WRITTEN_COLUMNS)
    assert get_args(FieldType) == get_args(ColumnType)


@each_kind
def test_mirrored_views_are_read(kind: str, tmp_path: Path):
    shards = small(tmp_path, kind, fields=VIEWS)
    ds = LatentDataset(tmp_path)
    stored = {name: np.concatenate([rows.latents[name] for rows in shards]) for name in VIEWS}
    assert ds.fields == VIEWS
    rows = ds[:]
    for name in VIEWS:
        np.testing.assert_array_equal(rows.latents[name], stored[name])
        np.testing.assert_array_equal(ds.column(name), stored[name])
        np.testing.assert_array_equal(ds[16].latents[name], stored[name][16])
    mirrored = rows.view("hflip")
    np.testing.assert_array_equal(mirrored.mu, stored["mu_hflip"])
    np.testing.assert_array_equal(mirrored.logvar, stored["logvar_hflip"])
    np.testing.assert_array_equal(rows.mu, stored["mu"])
    np.testing.assert_array_equal(mirrored.view("identity").mu, stored["mu"])
    assert mirrored.keys == rows.keys
    numbers = np.arange(len(ds))
    drawn = sample(mirrored.mu, mirrored.logvar, numbers, seed=4, epoch=2, view="hflip")
    np.testing.assert_array_equal(mirrored.sample(seed=4, epoch=2)[rows.valid], drawn[rows.valid])
    assert (mirrored.sample() != rows.sample())[rows.valid].all()
    assert not mirrored.sample()[~rows.valid].any()


@each_kind
def test_mirrored_views_are_normalised_like_the_images(kind: str, tmp_path: Path):
    small(tmp_path, kind, fields=VIEWS)
    raw, ds = LatentDataset(tmp_path)[:], LatentDataset(tmp_path, normalized=True)
    mean, std = (np.array(ds.statistics[f"latents_{what}"])[:, None] for what in ("mean", "std"))
    expected = (raw.latents["mu_hflip"] - mean) / std * raw.valid[:, None, None]
    np.testing.assert_allclose(ds[:].view("hflip").mu, expected, atol=1e-5)
    expected = (raw.latents["logvar_hflip"] - 2 * np.log(std)) * raw.valid[:, None, None]
    np.testing.assert_allclose(ds[:].view("hflip").logvar, expected, atol=1e-5)


def test_a_view_that_is_not_stored(tmp_path: Path):
    small(tmp_path, "npy")
    with pytest.raises(UserError, match=r"no view 'hflip': .* stores mu, logvar\. .*views: \[iden"):
        LatentDataset(tmp_path)[:].view("hflip")


@each_kind
def test_samples_are_read_and_have_no_mean(kind: str, tmp_path: Path):
    shards = small(tmp_path, kind, fields=("z", "z_hflip"))
    stored = np.concatenate([rows.latents["z"] for rows in shards])
    ds = LatentDataset(tmp_path)
    rows = ds[:]
    np.testing.assert_array_equal(rows.latents["z"], stored)
    np.testing.assert_array_equal(rows.sample(seed=9, epoch=4), stored)
    mirrored = np.concatenate([rows.latents["z_hflip"] for rows in shards])
    np.testing.assert_array_equal(rows.view("hflip").sample(), mirrored)
    assert rows.logvar is None
    for found in (rows, ds[3], rows.view("hflip")):
        with pytest.raises(UserError, match="stores z, z_hflip, no mu.*made with store: sample"):
            _ = found.mu
    with pytest.raises(UserError, match="no column 'mu' .* label, label_text, z, z_hflip"):
        ds.column("mu")
    normal = LatentDataset(tmp_path, normalized=True)[:]
    z = normal.sample()[normal.valid]
    np.testing.assert_allclose(z.mean((0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 2)), 1, atol=1e-5)
    assert not normal.sample()[~normal.valid].any()


@each_kind
def test_texts_are_read(kind: str, tmp_path: Path):
    shards = small(tmp_path, kind)
    texts = [text for rows in shards for text in rows.texts]
    assert None in texts
    ds = LatentDataset(tmp_path)
    assert ds.column("text").tolist() == texts
    assert ds[:].texts == texts
    assert ds[16].text == texts[16]
    assert sorted(str(text) for b in ds.batches(6) for text in b.texts) == sorted(map(str, texts))


@each_kind
def test_columns_of_the_json_are_read(kind: str, tmp_path: Path):
    fields = [{"n": row, "x": row / 8, "name": f"ü{row}", "odd": row % 2 == 1} for row in range(7)]
    metadata = [*map(json.dumps, fields), None]
    kinds: dict[str, ColumnType] = {"n": "int64", "x": "float64", "name": "string", "odd": "bool"}
    columns = {name: Column(k, field_values(metadata, name, k)) for name, k in kinds.items()}
    rows = replace(make_rows(0, 8), metadata=metadata, columns=columns)
    write_export(tmp_path, [rows], [kind])
    ds = LatentDataset(tmp_path)
    nothing = {"n": 0, "x": 0.0, "name": "", "odd": False}
    for name, type_name in kinds.items():
        found = ds.column(name)
        assert found.dtype == ("O" if type_name == "string" else np.dtype(type_name))
        assert found.tolist() == [entry[name] for entry in [*fields, nothing]]
    with pytest.raises(UserError, match="no column 'm' .*, mu, logvar, n, name, odd, x"):
        ds.column("m")


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        ("int64", [0, -(2**63), 2**63 - 1], [1.0, True, "1", 2**63, None, [1]]),
        ("float64", [0.5, 3, -1e300], [True, "1", 10**400, float("nan"), float("inf")]),
        ("string", ["", "ä\U0001f600"], [1, None, "\ud800", ["a"]]),
        ("bool", [True, False], [0, 1, "true", None]),
    ],
)
def test_values_of_a_type_are_taken_and_others_are_none(kind: FieldType, right: list, wrong: list):
    def found(values: list) -> list:
        return field_values([json.dumps({"a": {"b": value}}) for value in values], "a.b", kind)

    assert found(right) == right
    assert found(wrong) == [None] * len(wrong)


@pytest.mark.parametrize("text", [None, "", "[1]", "no JSON", "{}", '{"a": 1}', '{"b": {"a": 1}}'])
def test_what_has_no_such_field(text: str | None):
    assert field_values([text], "a.b", "int64") == [None]


@each_kind
def test_files_from_before_there_were_texts_are_read(kind: str):
    files = LocalFiles(ROOT / "tests/golden/rows-without-text" / kind)
    suffixes = [".npy", ".parquet"] if kind == "npy" else [f".{kind}"]
    layout = Layout(("mu", "logvar"), (2, 3), "float32")
    reader = READERS[kind]([files.open(f"shard-7{suffix}") for suffix in suffixes], layout)
    rows = np.arange(8)
    assert reader.column("text", rows).tolist() == [None] * 8
    assert reader.column("key", rows)[7] == "cats/007"
    assert json.loads(reader.column("metadata", rows)[3]) == {"x": 3 / 8, "name": "é3"}
    assert reader.latents("logvar", rows).shape == (8, 2, 3)
