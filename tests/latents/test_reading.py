"""Rows by number, slice and key in every format: what was written, and nothing else."""

import hashlib
import json
import pickle
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.common.errors import UserError
from pipeline.latents import NO_LABEL, LatentDataset, LatentRows, UnknownKeyError, manifest
from pipeline.latents.formats import READERS
from pipeline.latents.formats.writers import NO_LABEL as NO_LABEL_OF_THE_WRITERS
from pipeline.latents.formats.writers import Writer
from tests.latents.exports import MODEL, make_rows, write_export

WRITERS = [kind() for kind in get_args(get_args(Writer)[0])]
KINDS = [writer.kind for writer in WRITERS]
COUNTS = (11, 1, 30)

each_kind = pytest.mark.parametrize("kind", KINDS)


def small(out: Path, kinds: list[str], shape=(3,), *, dtype="float32", **options) -> list:
    shards = [make_rows(n, c, shape, dtype=dtype, **options) for n, c in enumerate(COUNTS)]
    write_export(out, shards, kinds, dtype=dtype)
    return shards


def joined(shards: list, name: str) -> np.ndarray | list:
    parts = [getattr(rows, name) for rows in shards]
    return list(chain(*parts)) if name in ("keys", "metadata") else np.concatenate(parts)


def assert_rows(found: LatentRows, shards: list, numbers: list[int]) -> None:
    assert found.index.tolist() == numbers
    assert list(found.keys) == [joined(shards, "keys")[n] for n in numbers]
    assert list(found.metadata) == [joined(shards, "metadata")[n] for n in numbers]
    np.testing.assert_array_equal(found.valid, joined(shards, "valid")[numbers])
    np.testing.assert_array_equal(found.labels, joined(shards, "labels")[numbers])
    np.testing.assert_array_equal(found.weight, joined(shards, "valid")[numbers])
    assert list(found.latents) == list(shards[0].latents)
    for field, values in found.latents.items():
        expected = np.concatenate([rows.latents[field] for rows in shards])[numbers]
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected)


def test_every_writer_has_a_reader():
    assert set(KINDS) <= set(READERS)


def test_no_label_is_that_of_the_writers():
    assert NO_LABEL == NO_LABEL_OF_THE_WRITERS


@pytest.mark.parametrize(
    "kind, dtype", [(writer.kind, dtype) for writer in WRITERS for dtype in writer.dtypes]
)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_rows_are_what_was_written(kind: str, shape: tuple[int, ...], dtype: str, tmp_path: Path):
    shards = small(tmp_path, [kind], shape, dtype=dtype)
    ds = LatentDataset(tmp_path)
    assert (len(ds), ds.latent_shape, ds.format) == (sum(COUNTS), shape, kind)
    everything = list(range(sum(COUNTS)))
    assert_rows(ds[:], shards, everything)
    assert_rows(ds[8:20:3], shards, everything[8:20:3])
    assert_rows(ds[::-1], shards, everything[::-1])
    assert_rows(ds[[40, 0, 11, 0, -1]], shards, [40, 0, 11, 0, 41])
    assert_rows(ds[np.array([12, 5])], shards, [12, 5])
    assert len(ds[5:5]) == len(ds[[]]) == 0
    assert ds[5:5].mu.shape == (0, *shape)


@each_kind
def test_one_row(kind: str, tmp_path: Path):
    shards = small(tmp_path, [kind])
    ds = LatentDataset(tmp_path)
    row = ds[12 + 4]
    assert (row.index, row.key, row.valid) == (16, "0002/00004", True)
    assert (row.label, row.metadata) == (0, '{"x": 4, "é": "ü"}')
    np.testing.assert_array_equal(row.mu, shards[2].latents["mu"][4])
    np.testing.assert_array_equal(row.logvar, shards[2].latents["logvar"][4])
    assert ds[-1].key == "0002/00029"
    assert not ds[3].valid
    assert not ds[3].mu.any()
    assert (ds[2].label, ds[1].metadata) == (NO_LABEL, None)
    for outside in (42, -43):
        with pytest.raises(IndexError, match=f"row {outside} of .* has 42 rows"):
            ds[outside]
    with pytest.raises(IndexError, match="rows are numbers, not bool"):
        ds[np.array([True])]
    assert [row.index for row in ds] == list(range(42))


@each_kind
def test_every_key_leads_to_its_row(kind: str, tmp_path: Path):
    shards = small(tmp_path, [kind])
    ds = LatentDataset(tmp_path)
    for number, key in enumerate(joined(shards, "keys")):
        assert ds.by_key(key).index == number
        assert ds.by_key(key).key == key
        assert ds.rows_of_key(key) == [number]


@each_kind
def test_columns(kind: str, tmp_path: Path):
    shards = small(tmp_path, [kind])
    ds = LatentDataset(tmp_path)
    assert ds.column("key").tolist() == joined(shards, "keys")
    assert ds.column("metadata").tolist() == joined(shards, "metadata")
    np.testing.assert_array_equal(ds.column("label"), joined(shards, "labels"))
    np.testing.assert_array_equal(ds.column("valid"), joined(shards, "valid"))
    for field in ("mu", "logvar"):
        expected = np.concatenate([rows.latents[field] for rows in shards])
        np.testing.assert_array_equal(ds.column(field), expected)
    with pytest.raises(
        UserError, match="no column 'labels' .* metadata, text, valid, label, label_text, mu"
    ):
        ds.column("labels")


@each_kind
def test_means_alone_without_labels_and_metadata(kind: str, tmp_path: Path):
    shards = small(tmp_path, [kind], fields=("mu",), notes=False)
    ds = LatentDataset(tmp_path)
    assert_rows(ds[:], shards, list(range(42)))
    assert ds[0].logvar is None
    assert ds[:].logvar is None
    with pytest.raises(UserError, match="needs a log-variance.*store: moments"):
        ds[:].sample()


def test_of_several_formats_the_fastest_is_read_or_the_one_asked_for(tmp_path: Path):
    shards = small(tmp_path, ["tar", "parquet"])
    assert LatentDataset(tmp_path).format == "parquet"
    ds = LatentDataset(tmp_path, format="tar")
    shutil.rmtree(tmp_path / "data/parquet")
    assert_rows(ds[:], shards, list(range(42)))
    with pytest.raises(UserError, match="holds no 'npy' files: its formats are tar, parquet"):
        LatentDataset(tmp_path, format="npy")


@pytest.mark.slow
@each_kind
def test_large_latents_over_pages_and_row_groups(kind: str, tmp_path: Path):
    """Of Parquet: three row groups, and rows that reach over the end of a page."""
    rows = make_rows(0, 3000, (5, 27, 29))
    write_export(tmp_path, [rows], [kind])
    if kind == "parquet":
        with pq.ParquetFile(tmp_path / "data/parquet/shard-000000.parquet") as file:
            assert file.metadata.num_row_groups >= 3
    chosen = np.random.default_rng(1).permutation(3000)[:1500]
    found = LatentDataset(tmp_path)[chosen]
    for field in ("mu", "logvar"):
        np.testing.assert_array_equal(found.latents[field], rows.latents[field][chosen])


def test_a_pickled_dataset_reads_on(tmp_path: Path):
    small(tmp_path, ["parquet"])
    ds = LatentDataset(tmp_path, normalized=True)
    other = pickle.loads(pickle.dumps(ds))
    np.testing.assert_array_equal(other[:].mu, ds[:].mu)


@each_kind
def test_normalised(kind: str, tmp_path: Path):
    shards = small(tmp_path, [kind], (3, 2, 2))
    ds, raw = LatentDataset(tmp_path, normalized=True), LatentDataset(tmp_path)
    valid = raw.column("valid")
    mu, logvar = (np.concatenate([rows.latents[f] for rows in shards]) for f in ("mu", "logvar"))
    axes = (0, 2, 3)
    mean = mu[valid].mean(axes, dtype=np.float64)
    std = np.sqrt(mu[valid].var(axes, dtype=np.float64) + np.exp(logvar[valid]).mean(axes))
    shape = (3, 1, 1)
    expected = (mu - mean.reshape(shape)) / std.reshape(shape) * valid[:, None, None, None]
    found = ds[:]
    assert found.mu.dtype == np.float32
    np.testing.assert_allclose(found.mu, expected, atol=1e-5)
    np.testing.assert_allclose(ds.column("mu"), expected, atol=1e-5)
    assert not found.latents["logvar"][~valid].any()
    # Samples of normalised rows are normalised samples.
    sampled = (raw[:].sample(seed=3) - mean.reshape(shape)) / std.reshape(shape)
    np.testing.assert_allclose(found.sample(seed=3)[valid], sampled[valid], atol=1e-5)
    assert not found.sample()[~valid].any()


@pytest.mark.parametrize("shape", [(3,), (3, 2, 4)])
@pytest.mark.parametrize("normalized", [True, False])
def test_denormalised(shape: tuple[int, ...], normalized: bool, tmp_path: Path):
    small(tmp_path, ["parquet"], shape)
    ds = LatentDataset(tmp_path, normalized=normalized)
    raw, normal = LatentDataset(tmp_path)[:], LatentDataset(tmp_path, normalized=True)[:]
    for of_normal, of_raw in ((normal.mu, raw.mu), (normal.sample(seed=3), raw.sample(seed=3))):
        found = ds.denormalize(of_normal)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[raw.valid], of_raw[raw.valid], atol=1e-5)
    assert ds.denormalize(np.zeros((2, *shape))).dtype == np.float32
    mean = np.array(ds.statistics["latents_mean"]).reshape(3, *(1 for _ in shape[1:]))
    found = ds.denormalize(np.zeros((2, *shape)))
    np.testing.assert_allclose(found, np.broadcast_to(mean, (2, *shape)), rtol=1e-6)


def test_only_latents_of_the_export_are_denormalised(tmp_path: Path):
    small(tmp_path / "maps", ["parquet"], (3, 2, 4))
    ds = LatentDataset(tmp_path / "maps", normalized=True)
    with pytest.raises(UserError, match=r"have the shape \[3, 2, 4\], but .* have \[n, 3, 2, 4\]"):
        ds.denormalize(ds[0].mu)
    rows = make_rows(0, 7, notes=False)
    rows.valid[:] = False
    write_export(tmp_path / "void", [rows], ["parquet"])
    with pytest.raises(UserError, match="no valid row, so it has no statistics"):
        LatentDataset(tmp_path / "void").denormalize(np.zeros((1, 3), np.float32))


def test_a_channel_that_never_varies_is_normalised_to_zero(tmp_path: Path):
    rows = make_rows(0, 20, fields=("mu",), notes=False)
    rows.latents["mu"][:, 1] = 7
    write_export(tmp_path, [rows], ["parquet"])
    mu = LatentDataset(tmp_path, normalized=True).column("mu")
    assert not mu[:, 1].any()
    np.testing.assert_allclose(LatentDataset(tmp_path).denormalize(mu)[:, 1], 7)
    np.testing.assert_allclose(mu[:, [0, 2]].std(0), 1, rtol=1e-5)


def test_statistics_are_the_exports(tmp_path: Path):
    small(tmp_path, ["parquet"])
    stored = json.loads((tmp_path / "latent_stats.json").read_bytes())
    assert LatentDataset(tmp_path).statistics == stored
    (tmp_path / "latent_stats.json").write_text("{}")
    with pytest.raises(UserError, match="latent_stats.json has not the hash"):
        LatentDataset(tmp_path, normalized=True)


def test_keys_that_come_twice(tmp_path: Path):
    write_export(tmp_path, [make_rows(n, 5, key="{row}") for n in range(2)], ["parquet"])
    ds = LatentDataset(tmp_path)
    assert ds.rows_of_key("3") == [3, 8]
    with pytest.raises(UserError, match=r"2 rows of .* have the key '3'.*rows 3, 8; read them by"):
        ds.by_key("3")


# --- what is not there


def test_unknown_key(tmp_path: Path):
    small(tmp_path, ["parquet"])
    ds = LatentDataset(tmp_path)
    assert ds.rows_of_key("none") == []
    message = f"No row of {tmp_path} has the key 'none' (42 rows, such as '0000/00000')."
    for kind in (UnknownKeyError, KeyError, UserError):
        with pytest.raises(kind) as error:
            ds.by_key("none")
        assert str(error.value) == message


def test_no_export(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"{path} holds no export: manifest.json is not there"):
            LatentDataset(path)


def test_unfinished_export(tmp_path: Path):
    small(tmp_path, ["parquet"])
    for name in ("_SUCCESS", "manifest.json"):
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match="unfinished export: _SUCCESS .* Give the export comm"):
            LatentDataset(tmp_path)


def test_another_model(tmp_path: Path):
    small(tmp_path, ["parquet"])
    assert len(LatentDataset(tmp_path, weights_sha256=MODEL)) == 42
    other = "cd" * 32
    with pytest.raises(UserError, match=f"another model: .*{MODEL}, expected was {other}"):
        LatentDataset(tmp_path, weights_sha256=other)


@pytest.mark.parametrize("name", ["manifest.json", "_SUCCESS"])
def test_manifest_that_was_changed(tmp_path: Path, name: str):
    small(tmp_path, ["parquet"])
    (tmp_path / name).write_text((tmp_path / name).read_text() + " x")
    with pytest.raises(UserError, match="has not the hash that _SUCCESS holds.*latentmill verify"):
        LatentDataset(tmp_path)


def test_another_version_of_the_format(tmp_path: Path):
    small(tmp_path, ["parquet"])
    text = (tmp_path / "manifest.json").read_text().replace(manifest.FORMAT, "latentmill-export-v9")
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "_SUCCESS").write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(UserError, match="format 'latentmill-export-v9'; this version reads"):
        LatentDataset(tmp_path)


@each_kind
def test_missing_shard(kind: str, tmp_path: Path):
    small(tmp_path, [kind])
    (path,) = (tmp_path / "data" / kind).glob(f"shard-000001.{kind}")
    path.unlink()
    ds = LatentDataset(tmp_path)
    assert ds[0].key == "0000/00000"
    with pytest.raises(UserError, match=f"{path} is missing: the export is damaged.*copy the file"):
        ds[11]


def test_missing_key_index(tmp_path: Path):
    small(tmp_path, ["parquet"])
    (tmp_path / "keys.parquet").unlink()
    with pytest.raises(UserError, match="keys.parquet is missing"):
        LatentDataset(tmp_path).by_key("0000/00000")


@each_kind
def test_files_cut_short_or_filled_with_other_bytes(kind: str, tmp_path: Path):
    small(tmp_path, [kind])
    for path in (tmp_path / "data" / kind / f"shard-000002.{kind}", tmp_path / "keys.parquet"):
        content = path.read_bytes()
        for other in (content[: len(content) // 2], bytes(len(content)), b"\xff" * len(content)):
            path.write_bytes(other)
            ds = LatentDataset(tmp_path)
            with pytest.raises(UserError, match=f"{path} .*the export is damaged"):
                ds[30] if "data" in path.parts else ds.by_key("0000/00000")
        path.write_bytes(content)


@each_kind
def test_bytes_flipped_anywhere_are_an_error_of_the_file_or_other_numbers(
    kind: str, tmp_path: Path
):
    """Only `verify` finds changed numbers; but structure that makes no sense is told as such."""
    small(tmp_path, [kind])
    path = tmp_path / "data" / kind / f"shard-000002.{kind}"
    content, generator = path.read_bytes(), np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    for place in generator.integers(0, len(content), 300).tolist():
        changed = bytearray(content)
        changed[place] ^= int(generator.integers(1, 256))
        path.write_bytes(changed)
        outcomes[outcome(tmp_path).replace(str(path), "FILE")[:5]] += 1
    assert set(outcomes) == {"FILE ", "30 ro"}


def outcome(out: Path) -> str:
    try:
        return f"{len(LatentDataset(out)[12:])} rows"
    except UserError as error:
        return str(error)
