"""Whole exports: right latents, every row once, the same bytes however the work was divided."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.common.errors import DONE, PREEMPTED, UserError
from pipeline.data.index import build_index
from pipeline.export.__main__ import main
from pipeline.export.command import begin, work_through
from pipeline.export.workers import Worker
from pipeline.latents.formats.writers import ParquetWriter, TarWriter
from pipeline.training.loading import load_run
from tests.export.world import (
    NUM_SHARDS,
    SHARD_ROWS,
    SPLIT,
    damage_sample,
    make_config,
    make_data,
    make_run,
    run_export,
    source_keys,
    tree,
)


def encode_slowly(run_dir: Path, data: Path, **load) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """key -> (mu, logvar): one picture at a time, decoded by Pillow."""
    model = load_run(run_dir, **load).model
    found = {}
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".png"):
                    continue
                with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                    small = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
                x = torch.tensor(small[None, None] / 255, dtype=torch.float32)
                with torch.inference_mode():
                    posterior = model(x, mode="encode").posterior
                key = member.name.removesuffix(".png")
                found[key] = posterior.mu[0].numpy(), posterior.logvar[0].numpy()
    return found


def test_latents_are_those_of_the_model(finished: Path, run_dir: Path, data: Path):
    expected = encode_slowly(run_dir, data)
    keys = []
    for path in sorted((finished / "data/parquet").glob("*.parquet")):
        rows = ParquetWriter().read(path)
        keys += rows.keys
        assert rows.valid.all()
        for place, key in enumerate(rows.keys):
            mu, logvar = expected[key]
            np.testing.assert_allclose(rows.latents["mu"][place], mu, atol=1e-5)
            np.testing.assert_allclose(rows.latents["logvar"][place], logvar, atol=1e-5)
    assert keys == source_keys(data)
    assert len(keys) == NUM_SHARDS * SHARD_ROWS


def test_labels_metadata_and_row_numbers_pass_through(finished: Path, data: Path):
    rows = TarWriter().read(finished / "data/tar/shard-000003.tar")
    assert rows.rows.tolist() == list(range(SHARD_ROWS))
    for text, label in zip(rows.metadata, rows.labels, strict=True):
        assert json.loads(text or "")["shape"] == label
    assert set(rows.labels.tolist()) == {0, 1, 2}
    del data


def test_finished_tree_is_what_the_layout_says(finished: Path):
    stems = [f"shard-{number:06d}" for number in range(NUM_SHARDS)]
    assert set(tree(finished)) == {
        "_SUCCESS",
        "keys.parquet",
        "latent_stats.json",
        "manifest.json",
        *(f"data/tar/{stem}.tar" for stem in stems),
        *(f"data/parquet/{stem}.parquet" for stem in stems),
    }
    manifest = (finished / "manifest.json").read_bytes()
    assert (finished / "_SUCCESS").read_text().strip() == hashlib.sha256(manifest).hexdigest()
    assert not (finished / "_stage").exists()


def test_outputs_name_no_place(finished: Path, run_dir: Path, data: Path):
    for path in finished.rglob("*"):
        if path.is_file() and "_run" not in path.parts:
            content = path.read_bytes()
            assert str(run_dir).encode() not in content
            assert str(data).encode() not in content
            assert str(finished).encode() not in content


@pytest.mark.parametrize("world", [2, 3])
def test_any_shares_give_the_same_bytes(finished: Path, run_dir: Path, tmp_path: Path, world: int):
    """Workers in this process, the last one first, each finding what the former ones left."""
    config = make_config(run_dir, tmp_path)
    last = Worker(world - 1, world)
    prepared, _ = begin(config, last)
    stops = iter([False] * 6 + [True])  # asked before each of a task's three batches
    assert work_through(prepared, last, lambda: next(stops)) == PREEMPTED
    assert not (tmp_path / "_SUCCESS").exists()
    assert run_export(config, Worker(0, world)) == DONE
    assert tree(tmp_path) == tree(finished)


def test_two_workers_at_once_give_the_same_bytes(finished: Path, run_dir: Path, tmp_path: Path):
    config = make_config(run_dir, tmp_path)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(run_export(config))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [DONE] * 3
    assert tree(tmp_path) == tree(finished)


def test_decode_threads_change_nothing(finished: Path, run_dir: Path, tmp_path: Path):
    assert run_export(make_config(run_dir, tmp_path, data={"threads": 5})) == DONE
    assert tree(tmp_path) == tree(finished)


def test_repeated_export_changes_nothing(finished: Path, run_dir: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run_export(make_config(run_dir, out)) == DONE
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"batch_size": 7}, ["encode.batch_size: there 6, now 7"]),
        ({"dtype": "float16"}, ["output.dtype: there 'float32', now 'float16'"]),
        ({"weights": "raw"}, ["model.weights: there 'ema', now 'raw'", "weights_sha256"]),
        ({"step": 1}, ["model.step: there 2, now 1"]),
        ({"store": "mean"}, ["output.fields.1: there 'logvar', now '(absent)'"]),
        ({"precision": "bf16"}, ["encode.precision"]),
        ({"data": {"split": "train"}}, ["  data.split: there 'all', now 'train/"]),
        ({"formats": [{"kind": "tar"}]}, ["output.formats.1"]),
    ],
)
def test_another_export_in_the_directory_is_refused(
    finished: Path, run_dir: Path, settings: dict, names: list[str]
):
    before = tree(finished)
    with pytest.raises(UserError, match="holds an export of something else") as error:
        run_export(make_config(run_dir, finished, **settings))
    for name in names:
        assert name in str(error.value)
    assert tree(finished) == before


def test_every_setting_is_connected(finished: Path, run_dir: Path, tmp_path: Path):
    """Each setting changes the files; otherwise it would have no effect."""
    seen = {(finished / "data/parquet/shard-000000.parquet").read_bytes()}
    settings = [
        {"dtype": "float16"},
        {"weights": "raw"},
        {"step": 1},
        {"store": "mean"},
        {"precision": "bf16"},
        {"data": {"split": "held_out"}},
    ]
    for number, setting in enumerate(settings):
        out = tmp_path / str(number)
        only = {"formats": [{"kind": "parquet"}]}
        assert run_export(make_config(run_dir, out, **only, **setting)) == DONE
        seen.add((out / "data/parquet/shard-000000.parquet").read_bytes())
    assert len(seen) == len(settings) + 1


def test_split_exports_its_rows_alone(run_dir: Path, data: Path, tmp_path: Path):
    keys: dict[str, list[str]] = {}
    for split in ("train", "held_out"):
        out = tmp_path / split
        assert run_export(make_config(run_dir, out, data={"split": split})) == DONE
        keys[split] = [
            key
            for path in sorted((out / "data/tar").iterdir())
            for key in TarWriter().read(path).keys
        ]
    assert sorted(keys["train"] + keys["held_out"]) == sorted(source_keys(data))
    held_out = SPLIT.names.index("held_out")
    assert all(SPLIT.number_of(key) == held_out for key in keys["held_out"])
    assert keys["held_out"]


def test_unreadable_pictures_keep_their_rows(run_dir: Path, tmp_path: Path):
    data = make_data(tmp_path / "data", shards=2)
    broken = damage_sample(data, "shard-000001.tar", 5)
    build_index(data, split=SPLIT)
    trees = []
    for name in ("a", "b"):
        out = tmp_path / name
        assert run_export(make_config(run_dir, out, data={"path": str(data)})) == DONE
        trees.append(tree(out))
    assert trees[0] == trees[1]
    manifest = json.loads((tmp_path / "a/manifest.json").read_bytes())
    ((row, key, stage, reason),) = manifest["tasks"][1]["faults"]
    assert (row, key, stage, manifest["failed_rows"]) == (5, broken, "decode", 1)
    assert reason
    assert "0x" not in reason
    rows = ParquetWriter().read(tmp_path / "a/data/parquet/shard-000001.parquet")
    assert np.flatnonzero(~rows.valid).tolist() == [5]
    assert not rows.latents["mu"][5].any()
    assert not rows.latents["logvar"][5].any()
    statistics = json.loads((tmp_path / "a/latent_stats.json").read_bytes())
    assert statistics["num_rows"] == 2 * SHARD_ROWS - 1


def test_latents_outside_float16_are_failed_rows(data: Path, tmp_path: Path):
    """float16 ends at 65504; float32 holds the same latents."""
    model = {"bottleneck": {"kind": "gaussian", "size": 3}}
    run_dir = make_run(tmp_path / "run", data, model, scale=1e5)
    config = make_config(run_dir, tmp_path / "16", dtype="float16", max_bad_fraction=1.0)
    assert run_export(config) == DONE
    rows = TarWriter().read(tmp_path / "16/data/tar/shard-000000.tar")
    assert not rows.valid.any()
    assert not rows.latents["mu"].any()
    manifest = json.loads((tmp_path / "16/manifest.json").read_bytes())
    assert manifest["tasks"][0]["faults"][3] == [
        3,
        "000000003",
        "latent",
        "not a finite float16 number",
    ]
    assert run_export(make_config(run_dir, tmp_path / "32")) == DONE


def test_changed_shard_stops_the_export(run_dir: Path, tmp_path: Path):
    data = make_data(tmp_path / "data", shards=2)
    with (data / "shard-000001.tar").open("ab") as file:
        file.write(bytes(512))
    config = make_config(run_dir, tmp_path / "out", data={"path": str(data)})
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        run_export(config)
    assert not (tmp_path / "out").exists()


def test_deterministic_model_stores_the_mean_alone(data: Path, tmp_path: Path):
    run_dir = make_run(tmp_path / "run", data, {"bottleneck": {"kind": "deterministic", "size": 4}})
    assert run_export(make_config(run_dir, tmp_path / "out")) == DONE
    rows = TarWriter().read(tmp_path / "out/data/tar/shard-000000.tar")
    assert list(rows.latents) == ["mu"]
    assert rows.latent_shape == (4,)
    statistics = json.loads((tmp_path / "out/latent_stats.json").read_bytes())
    assert statistics["sigma2_mean"] is None


def test_key_index_finds_every_row(finished: Path, data: Path):
    with pq.ParquetFile(finished / "keys.parquet") as file:
        index = file.read().to_pydict()
    assert index["key_hash"] == sorted(index["key_hash"])
    assert sorted(index["key"]) == sorted(source_keys(data))
    for key, shard, position in zip(index["key"], index["shard"], index["position"], strict=True):
        if shard == "shard-000004":
            rows = ParquetWriter().read(finished / f"data/parquet/{shard}.parquet")
            assert rows.keys[position] == key


def test_out_that_cannot_be_written_is_a_clear_error(run_dir: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run_export(make_config(run_dir, tmp_path / "file/out"))


def test_command_reports_wrong_use(run_dir: Path, tmp_path: Path, capsys):
    config = tmp_path / "export.yaml"
    config.write_text(f"run: {run_dir}\nout: {tmp_path / 'out'}\nbatchsize: 3\ndtype: float64\n")
    assert main([str(config)]) == 2
    printed = capsys.readouterr().err
    assert "batch_size" in printed
    assert "float64" in printed
    assert not (tmp_path / "out").exists()
