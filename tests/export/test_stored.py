"""Stored values: samples with keyed noise, mirrored views, texts, labels, JSON columns."""

import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter as ShardWriter

from pipeline.common import strict
from pipeline.common.errors import DONE, WRONG_USE, UserError
from pipeline.data.decode import ArrayDecode
from pipeline.data.index import build_index
from pipeline.data.sequential import RowBatch, RowFault
from pipeline.export.__main__ import main
from pipeline.export.statistics import partial_of
from pipeline.export.verify.audit import _equal
from pipeline.export.verify.levels import verify_export
from pipeline.export.work import Encoding, encode_task
from pipeline.export.workers import Worker
from pipeline.latents import NO_LABEL, LatentDataset
from pipeline.latents.formats import READERS
from pipeline.latents.formats.writers import ParquetWriter
from pipeline.training.loading import load_run
from tests.export.world import make_config, make_run, run_export, tree

ROWS, SHARDS = 8, 3
BAD = ROWS + 2  # this sample's image is no image
ALL_FORMATS = [{"kind": kind} for kind in READERS]
PARQUET = [{"kind": "parquet"}]
GAUSSIAN = {"bottleneck": {"kind": "gaussian", "size": 3}}


def metadata_of(number: int) -> dict[str, Any]:
    return {
        "class": number % 4,
        "score": number / 8,
        "tag": f"ä{number % 3}",
        "even": number % 2 == 0,
    }


def text_of(number: int) -> str:
    return f"the {number}-th\nthing, schön" if number % 3 else ""


def write_data(folder: Path, *, mirrored: bool = False, without: tuple[int, ...] = ()) -> Path:
    """Shards of noise images of the size that the model takes; some JSON lacks the class."""
    folder.mkdir()
    for shard in range(SHARDS):
        with ShardWriter(str(folder / f"s-{shard}.tar"), mtime=0) as tar:
            for number in range(shard * ROWS, (shard + 1) * ROWS):
                pixels = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels[:, ::-1] if mirrored else pixels).save(file, format="PNG")
                fields = metadata_of(number)
                if number in without:
                    del fields["class"]
                tar.write(
                    {
                        "__key__": f"{number:04d}",
                        "png": b"broken" if number == BAD else file.getvalue(),
                        "cls": b"9",
                        "json": json.dumps(fields).encode(),
                        "txt": text_of(number).encode(),
                    }
                )
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("stored") / "data")


@pytest.fixture(scope="module")
def model_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), shards, GAUSSIAN)


def export(model_run: Path, out: Path, worker: Worker | None = None, **settings: Any) -> Path:
    """Make an export that tolerates the bad sample; return its directory."""
    config = make_config(model_run, out, **{"max_bad_fraction": 0.2, **settings})
    assert run_export(config, worker) == DONE
    return out


def statistics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "latent_stats.json").read_bytes())


# --- samples


@pytest.mark.parametrize("views", [["identity"], ["identity", "hflip"]], ids="-".join)
def test_the_stored_sample_is_the_readers_bit_for_bit(
    model_run: Path, tmp_path: Path, views: list[str]
):
    options = {"formats": ALL_FORMATS, "views": views}
    moments = LatentDataset(export(model_run, tmp_path / "moments", **options))[:]
    out = export(model_run, tmp_path / "z", store="sample", seed=7, **options)
    for kind in READERS:
        stored = LatentDataset(out, format=kind)[:]
        for view in views:
            expected = moments.view(view).sample(seed=7, epoch=0)
            np.testing.assert_array_equal(stored.view(view).sample(), expected)
        np.testing.assert_array_equal(stored.valid, moments.valid)
        assert stored.valid.sum() == SHARDS * ROWS - 1
    assert verify_export(out).problems == []


def test_samples_do_not_depend_on_workers_and_batches(model_run: Path, tmp_path: Path):
    def z(name: str, **settings: Any) -> np.ndarray:
        out = export(model_run, tmp_path / name, store="sample", **settings)
        return LatentDataset(out)[:].latents["z"]

    one, three = z("one"), tmp_path / "three"
    workers = [Worker(rank, 3) for rank in range(3)]
    threads = [
        threading.Thread(target=export, args=(model_run, three, worker), kwargs={"store": "sample"})
        for worker in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree(three) == tree(tmp_path / "one")
    # The encoder may sum in another order in other batches; the noise is the same.
    np.testing.assert_allclose(z("batches", batch_size=5), one, rtol=0, atol=1e-5)
    assert (z("seed", seed=1) != one)[np.arange(len(one)) != BAD].all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_samples_are_rounded_once(model_run: Path, tmp_path: Path, dtype: str):
    formats = [{"kind": "safetensors"}]
    exact = export(model_run, tmp_path / "32", store="sample", formats=formats)
    rounded = export(model_run, tmp_path / "16", store="sample", formats=formats, dtype=dtype)
    z, found = (LatentDataset(out)[:].sample() for out in (exact, rounded))
    expected = torch.from_numpy(z).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(found, expected)


def test_statistics_of_samples(model_run: Path, tmp_path: Path):
    out = export(model_run, tmp_path / "z", store="sample", formats=PARQUET)
    found, rows = statistics_of(out), LatentDataset(out)[:]
    z = rows.latents["z"][rows.valid].astype(np.float64)
    np.testing.assert_allclose(found["z"]["mean"], z.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["latents_std"], z.std(0), rtol=1e-12)
    assert "mu" not in found
    assert found["sigma2_mean"] is found["active_units"] is None


def test_a_model_without_variance_cannot_be_sampled(shards: Path, tmp_path: Path):
    run = make_run(tmp_path / "run", shards, {"bottleneck": {"kind": "deterministic", "size": 4}})
    with pytest.raises(UserError, match=r"store is sample, but .* deterministic .*store to mean"):
        run_export(make_config(run, tmp_path / "out", store="sample"))
    assert not (tmp_path / "out").exists()


# --- mirrored images


def test_hflip_is_what_mirrored_images_give(model_run: Path, tmp_path: Path):
    views = ["identity", "hflip"]
    out = export(model_run, tmp_path / "both", formats=ALL_FORMATS, views=views)
    mirrored = write_data(tmp_path / "mirrored", mirrored=True)
    other = export(model_run, tmp_path / "other", data={"path": str(mirrored)})
    expected, plain = (LatentDataset(path)[:] for path in (other, out))
    for kind in READERS:
        rows = LatentDataset(out, format=kind)[:]
        assert list(rows.latents) == ["mu", "logvar", "mu_hflip", "logvar_hflip"]
        np.testing.assert_array_equal(rows.view("hflip").mu, expected.mu)
        np.testing.assert_array_equal(rows.view("hflip").logvar, expected.logvar)
        np.testing.assert_array_equal(rows.mu, plain.mu)
    assert (plain.mu != expected.mu)[plain.valid].all()
    alone = export(model_run, tmp_path / "alone")
    np.testing.assert_array_equal(LatentDataset(alone)[:].mu, plain.mu)
    assert statistics_of(alone) == statistics_of(out)
    assert verify_export(out).problems == []


def test_only_images_are_mirrored(tmp_path: Path, model_run: Path):
    run = tmp_path / "run"
    shutil.copytree(model_run, run)
    config = load_run(model_run).config
    arrays = ArrayDecode(shape=(1, 32, 32), range=(0.0, 1.0))
    data = config.data.model_copy(update={"decode": arrays})
    trained = config.model_copy(update={"data": data})
    (run / "config.yaml").write_text(strict.dump(trained))
    config = make_config(run, tmp_path / "out", views=["identity", "hflip"])
    with pytest.raises(UserError, match=r"data\.decode\.kind is 'array': only images are mirrored"):
        run_export(config)


# --- texts, labels, columns


def test_texts_and_fields_of_the_json_pass_through(model_run: Path, tmp_path: Path):
    kinds = {"score": "float64", "class": "int64", "tag": "string", "even": "bool"}
    options = {"columns": kinds, "data": {"label_field": "class"}}
    out = export(model_run, tmp_path / "out", formats=ALL_FORMATS, **options)
    numbers = range(SHARDS * ROWS)
    for kind in READERS:
        ds = LatentDataset(out, format=kind)
        assert ds.column("text").tolist() == [text_of(n) or None for n in numbers]
        assert ds.column("label").tolist() == [n % 4 for n in numbers]
        for name in kinds:
            assert ds.column(name).tolist() == [metadata_of(n)[name] for n in numbers]
    for folder in ("parquet", "npy"):
        files = sorted((out / "data" / folder).glob("*.parquet"))
        table = pads.dataset(files).to_table()  # of one schema
        assert {name: str(table.schema.field(name).type) for name in kinds} == {
            "score": "double",
            "class": "int64",
            "tag": "string",
            "even": "bool",
        }
        for name in kinds:
            assert table[name].to_pylist() == [metadata_of(n)[name] for n in numbers]
        assert table["text"].to_pylist() == [text_of(n) or None for n in numbers]
    assert verify_export(out).problems == []


def test_without_the_setting_the_label_is_that_of_the_index(model_run: Path, tmp_path: Path):
    out = export(model_run, tmp_path / "out", formats=PARQUET)
    assert set(LatentDataset(out).column("label").tolist()) == {9}
    for path in (out / "data/parquet").iterdir():
        assert ParquetWriter().read(path).columns == {}


MISSING = "2 of the 8 samples of s-2 have no field 'class' of type int64 in their JSON; the first"


@pytest.mark.parametrize(
    "settings, expected",
    [
        ("data: {label_field: class, path: PATH}", [MISSING, "data.label_field names this field"]),
        ("columns: {class: int64}\ndata: {path: PATH}", [MISSING, "columns names this field"]),
        (
            "columns: {tag: int64}",
            ["8 of the 8 samples of s-0", "'tag' of type int64", "'0000', which has {"],
        ),
    ],
)
def test_a_field_that_samples_lack_is_a_mistake(
    model_run: Path, tmp_path: Path, capsys, settings: str, expected: list[str]
):
    data = write_data(tmp_path / "data", without=(2 * ROWS + 3, 2 * ROWS + 5))
    config = tmp_path / "export.yaml"
    settings = settings.replace("PATH", str(data))
    out = tmp_path / "out"
    config.write_text(f"run: {model_run}\nout: {out}\nmax_bad_fraction: 0.2\n{settings}\n")
    assert main([str(config), "--worker", "0/1"]) == WRONG_USE
    printed = capsys.readouterr().err
    for part in expected:
        assert part in printed
    if MISSING in expected:
        assert f"'{2 * ROWS + 3:04d}'" in printed
    assert not list(out.rglob("*s-2.parquet"))
    with pytest.raises(UserError, match="unfinished export"):
        LatentDataset(out)


def test_a_sample_that_cannot_be_read_needs_no_field(model_run: Path, tmp_path: Path):
    data = write_data(tmp_path / "data", without=(BAD,))
    source = {"path": str(data), "label_field": "class"}
    out = export(model_run, tmp_path / "out", data=source, columns={"class": "int64"})
    ds = LatentDataset(out)
    assert (ds[BAD].valid, ds[BAD].label) == (False, NO_LABEL)
    assert ds.column("class")[BAD] == 0
    rows = ParquetWriter().read(out / "data/parquet/s-1.parquet")
    assert rows.columns["class"].values[BAD - ROWS] is None
    assert verify_export(out).problems == []


# --- rows that are not finite


def test_a_row_is_valid_only_if_all_its_fields_are_finite():
    """Two exceed float16 in one view only, and one could not be decoded."""
    x = torch.zeros(6, 1, 2, 2)
    x[1, 0, 0, 0] = x[4, 0, 1, 1] = 1.0
    batch = RowBatch(
        x=x,
        num_rows=5,
        rows=np.arange(10, 15),
        keys=list("abcde"),
        valid=np.array([True, True, False, True, True]),
        faults=[RowFault(12, "c", "decode", "broken")],
        labels=np.zeros(5, np.int64),
        metadata=["null", "", None, "{}", "{}"],
        texts=["", None, None, "t", "t"],
    )
    encoder = Encoding(
        encode=lambda x: {"mu": 1e6 * x[:, :, :, 0]},
        to_unit=lambda x: x,
        device=torch.device("cpu"),
        precision="fp32",
        stored=("mu",),
        dtype="float16",
        views=("identity", "hflip"),
    )
    rows, faults = encode_task("s", [batch], encoder, max_bad_fraction=1, on_rows=lambda _: None)
    assert rows.valid.tolist() == [True, False, False, True, False]
    assert [(row, key, stage) for row, key, stage, _ in faults] == [
        (11, "b", "latent"),
        (12, "c", "decode"),
        (14, "e", "latent"),
    ]
    assert not any(values[~rows.valid].any() for values in rows.latents.values())
    assert list(rows.metadata) == [None, None, None, "{}", "{}"]
    assert list(rows.texts) == [None, None, None, "t", "t"]
    assert partial_of(rows.latents, rows.valid, faults).not_finite == 2


# --- settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"views": ["hflip"]}, r"views is \[hflip\], but must be \[identity\] or \[identity, hf"),
        ({"views": []}, "views is"),
        ({"views": ["hflip", "identity"]}, "views is"),
        ({"seed": 3}, "seed is 3, but store: moments draws nothing"),
        ({"columns": {"key": "string"}}, "'key', which every export has already"),
        ({"columns": {"mu_hflip": "float64"}}, "'mu_hflip', which every export has already"),
        ({"columns": {"a.b": "float64"}}, "without dots"),
        ({"columns": {"a": "float32"}}, "int64"),
    ],
)
def test_settings_that_clash_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, tmp_path, **settings)


def test_every_setting_is_connected(model_run: Path, tmp_path: Path):
    """Each setting changes the files and is part of the plan: another one is refused."""
    out = export(model_run, tmp_path / "out", formats=PARQUET)
    first = out / "data/parquet/s-0.parquet"
    seen = {first.read_bytes()}
    changes = [
        {"store": "sample"},
        {"store": "sample", "seed": 1},
        {"views": ["identity", "hflip"]},
        {"columns": {"score": "float64"}},
        {"data": {"label_field": "class"}},
    ]
    for number, change in enumerate(changes):
        with pytest.raises(UserError, match="holds an export of something else"):
            export(model_run, out, formats=PARQUET, **change)
        other = export(model_run, tmp_path / str(number), formats=PARQUET, **change)
        seen.add((other / "data/parquet/s-0.parquet").read_bytes())
    assert len(seen) == 1 + len(changes)


def test_verify_compares_all_that_formats_hold(model_run: Path, tmp_path: Path):
    options = {"columns": {"tag": "string"}, "views": ["identity", "hflip"]}
    out = export(model_run, tmp_path / "out", formats=PARQUET, **options)
    path = out / "data/parquet/s-0.parquet"
    assert _equal(ParquetWriter().read(path), ParquetWriter().read(path))
    for name in ("texts", "metadata", "latents", "columns"):
        rows = ParquetWriter().read(path)
        value = getattr(rows, name)
        if name == "latents":
            value["logvar_hflip"] = value["logvar_hflip"] + 1
        elif name == "columns":
            value["tag"].values[3] = "other"
        else:
            value[3] = "{}"
        assert not _equal(ParquetWriter().read(path), rows)
        assert not _equal(rows, ParquetWriter().read(path))
