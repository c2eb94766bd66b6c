"""All formats of one export: equal rows, always the same bytes, all checked by verify."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.common.errors import DONE, PREEMPTED, WRONG_USE
from pipeline.evaluation.exported import probe_export
from pipeline.export.__main__ import main
from pipeline.export.command import begin, work_through
from pipeline.export.statistics import merge, partial_of, to_text
from pipeline.export.verify.levels import verify_export
from pipeline.export.workers import Worker
from pipeline.latents.formats.writers import BaseWriter, NpyWriter, Rows, SafetensorsWriter, Writer
from tests.export.test_verify import flip_bit, rewrite_with, seal
from tests.export.world import NUM_SHARDS, make_config, run_export, tree

WRITERS: list[BaseWriter] = [kind() for kind in get_args(get_args(Writer)[0])]
FORMATS = [{"kind": writer.kind} for writer in WRITERS]
SUFFIXES = [(writer, suffix) for writer in WRITERS for suffix in writer.suffixes]
SHARD = "shard-000002"
FILES = [f"data/{writer.kind}/{SHARD}{suffix}" for writer, suffix in SUFFIXES]
WITHOUT_BFLOAT16 = [one.kind for one in WRITERS if "bfloat16" not in one.dtypes]


@pytest.fixture(scope="module")
def everything(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in all formats; not to be changed."""
    out = tmp_path_factory.mktemp("everything") / "out"
    assert run_export(make_config(run_dir, out, formats=FORMATS)) == DONE
    return out


@pytest.fixture
def out(everything: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(everything, tmp_path / "out")
    return tmp_path / "out"


def test_every_format_has_its_files_and_nothing_else(everything: Path, data: Path):
    stems = [f"shard-{number:06d}" for number in range(NUM_SHARDS)]
    for kind in {writer.kind for writer in WRITERS}:
        suffixes = [suffix for writer, suffix in SUFFIXES if writer.kind == kind]
        expected = {f"{stem}{suffix}" for stem in stems for suffix in suffixes}
        assert {path.name for path in (everything / "data" / kind).iterdir()} == expected
    report = verify_export(everything, source=data)
    assert report.problems == []
    assert report.files == len(SUFFIXES) * NUM_SHARDS + 2


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.kind)
def test_one_format_alone_has_the_same_bytes(
    everything: Path, run_dir: Path, data: Path, tmp_path: Path, writer: BaseWriter
):
    only = [{"kind": writer.kind}]
    assert run_export(make_config(run_dir, tmp_path, formats=only)) == DONE
    whole = tree(everything)
    for name, digest in tree(tmp_path).items():
        if name not in ("manifest.json", "_SUCCESS"):
            assert whole[name] == digest, name
    assert verify_export(tmp_path, source=data).problems == []
    assert probe_export(tmp_path) == probe_export(everything)


def test_stopped_and_shared_out_it_has_the_same_bytes(
    everything: Path, run_dir: Path, tmp_path: Path
):
    config = make_config(run_dir, tmp_path, formats=FORMATS)
    last = Worker(2, 3)
    stops = iter([False] * 7 + [True])  # in the third task, of three batches each
    assert work_through(begin(config, last)[0], last, lambda: next(stops)) == PREEMPTED
    assert run_export(config, Worker(0, 2)) == DONE
    assert tree(tmp_path) == tree(everything)


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_flipped_bit_and_a_missing_file(out: Path, name: str):
    flip_bit(out / name)
    assert f"{name} has other content than was committed (sha256)" in verify_export(out).problems
    (out / name).unlink()
    assert f"{name} is missing" in verify_export(out, level="listing").problems


@pytest.mark.parametrize("name", ["data/npy/extra.npy", "data/npy/sub/x.parquet"])
def test_verify_finds_what_a_reader_of_matrices_would_trip_over(out: Path, name: str):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
    assert verify_export(out, level="listing").problems == [f"{name} is not of this export"]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.kind)
def test_verify_finds_swapped_rows_behind_fitting_hashes(out: Path, data: Path, writer: BaseWriter):
    name = f"data/{writer.kind}/{SHARD}{writer.suffix}"

    def swap(rows: Rows) -> Rows:
        return replace(rows, keys=[rows.keys[1], rows.keys[0], *rows.keys[2:]])

    rewrite_with(writer, out / name, swap)
    seal(out)
    problems = verify_export(out, source=data).problems
    assert any(f"{name}: other keys, or in another order, than {data}" in p for p in problems)


@pytest.mark.parametrize("writer", WRITERS[1:], ids=lambda writer: writer.kind)
def test_verify_finds_other_latents_in_one_format(out: Path, writer: BaseWriter):
    name = f"data/{writer.kind}/{SHARD}{writer.suffix}"

    def negate(rows: Rows) -> Rows:
        return replace(rows, latents={field: -v for field, v in rows.latents.items()})

    rewrite_with(writer, out / name, negate)
    seal(out)
    first = f"data/{WRITERS[0].kind}/{SHARD}{WRITERS[0].suffix}"
    assert f"{name} holds other rows than {first}" in verify_export(out).problems


def test_verify_finds_a_matrix_beside_the_twin_of_another_shard(out: Path):
    twin = out / f"data/npy/{SHARD}.parquet"
    shutil.copy(out / "data/npy/shard-000003.parquet", twin)
    seal(out)
    problems = verify_export(out).problems
    assert any(f"data/npy/{SHARD}.npy: other keys" in problem for problem in problems)


def test_verify_finds_a_twin_that_the_manifest_does_not_list(out: Path):
    manifest = json.loads((out / "manifest.json").read_bytes())
    files = manifest["tasks"][2]["files"]
    manifest["tasks"][2]["files"] = [f for f in files if f["path"] != f"data/npy/{SHARD}.parquet"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    problems = verify_export(out, level="keys").problems
    assert f"data/npy/{SHARD}.parquet is not of this export" in problems
    assert f"{SHARD}: manifest.json lists other files than its formats have" in problems


def test_bfloat16_is_the_rounded_float32_export(
    everything: Path, run_dir: Path, data: Path, tmp_path: Path
):
    config = make_config(run_dir, tmp_path, formats=[{"kind": "safetensors"}], dtype="bfloat16")
    assert run_export(config) == DONE
    assert verify_export(tmp_path, source=data).problems == []
    partials = []
    for path in sorted((tmp_path / "data/safetensors").iterdir()):
        exact = load_file(everything / "data/safetensors" / path.name)
        for field in ("mu", "logvar"):
            assert torch.equal(load_file(path)[field], exact[field].bfloat16())
        rows = SafetensorsWriter().read(path)
        partials.append(partial_of(rows.latents, rows.valid))
    assert (tmp_path / "latent_stats.json").read_bytes() == to_text(merge(partials))
    assert probe_export(tmp_path)


def test_float16_matrix_is_the_rounded_float32_one(everything: Path, run_dir: Path, tmp_path: Path):
    config = make_config(run_dir, tmp_path, formats=[{"kind": "npy"}], dtype="float16")
    assert run_export(config) == DONE
    path = f"data/npy/{SHARD}.npy"
    exact = np.load(everything / path)
    np.testing.assert_array_equal(np.load(tmp_path / path), exact.astype(np.float16))
    assert NpyWriter().read(tmp_path / path).latents["logvar"].dtype == np.float16


@pytest.mark.parametrize("kind", WITHOUT_BFLOAT16)
def test_bfloat16_in_a_format_that_has_none_is_wrong_use(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
):
    config = tmp_path / "export.yaml"
    formats = f"[{{kind: safetensors}}, {{kind: {kind}}}]"
    config.write_text(f"run: {run_dir}\nout: {tmp_path}/out\ndtype: bfloat16\nformats: {formats}\n")
    assert main([str(config)]) == WRONG_USE
    printed = capsys.readouterr().err
    assert f"dtype is 'bfloat16', which {kind} cannot hold" in printed
    assert "Set dtype to float32 or float16, or formats to [{kind: safetensors}] alone." in printed
    assert not (tmp_path / "out").exists()
