"""verify's last level: the run's model gives the stored latents, and no other model does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.__main__ import main
from pipeline.common.errors import DONE, FAILED, WRONG_USE, UserError
from pipeline.export.verify.levels import VerifyReport, verify_export
from pipeline.export.verify.reencode import verify_with_run
from pipeline.latents.formats import READERS
from pipeline.latents.formats.writers import Rows
from tests.export.test_verify import rewrite, seal
from tests.export.world import NUM_SHARDS, SHARD_ROWS, make_config, make_data, make_run, run_export

GAUSSIAN = {"bottleneck": {"kind": "gaussian", "size": 3}}
ALL_FORMATS = [{"kind": kind} for kind in READERS]
SETTINGS = [
    {},
    {"formats": ALL_FORMATS},
    *({"formats": [{"kind": kind}]} for kind in READERS),
    {"step": 1},
    {"weights": "raw"},
    {"precision": "bf16"},
    {"batch_size": 5},
    {"data": {"split": "held_out"}},
    {"store": "mean"},
    {"store": "sample", "seed": 7},
    {"store": "sample", "views": ["identity", "hflip"]},
    {"views": ["identity", "hflip"], "formats": ALL_FORMATS},
    {"dtype": "float16", "formats": ALL_FORMATS},
    {"dtype": "bfloat16", "formats": [{"kind": "safetensors"}]},
    {"data": {"label_field": "shape"}, "columns": {"scale": "float64", "shape": "int64"}},
]


def check(out: Path, run: Path, *, tasks: int = NUM_SHARDS, **places: Any) -> VerifyReport:
    places = {"source": None, "shards": None} | places
    return verify_with_run(str(out), str(run), num_tasks=tasks, **places)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of the same architecture and steps, with other weights."""
    return make_run(tmp_path_factory.mktemp("other"), data, GAUSSIAN, scale=0.5)


@pytest.fixture
def forged(finished: Path, tmp_path: Path) -> Callable[[Path], Path]:
    """An export with the fingerprint of the run, latents of another run, and valid hashes."""

    def forge(theirs: Path) -> Path:
        out = Path(shutil.copytree(theirs, tmp_path / "forged"))
        good = json.loads((finished / "manifest.json").read_bytes())
        manifest = json.loads((out / "manifest.json").read_bytes())
        manifest["fingerprint"] = good["fingerprint"]
        (out / "manifest.json").write_text(json.dumps(manifest))
        seal(out)
        return out

    return forge


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_right_run_gives_the_same_bits(
    run_dir: Path, data: Path, tmp_path: Path, settings: dict[str, Any]
):
    assert run_export(make_config(run_dir, tmp_path, **settings)) == DONE
    report = check(tmp_path, run_dir, source=str(data))
    assert report.problems == []
    assert report.level == "encode"
    assert report.notes == [f"{report.rows} rows encoded anew, {report.rows} of them bit for bit"]
    split = settings.get("data", {}).get("split")
    assert (report.rows == NUM_SHARDS * SHARD_ROWS) == (split is None)


def test_only_so_many_tasks_are_encoded(finished: Path, run_dir: Path):
    report = check(finished, run_dir, tasks=2)
    assert report.ok
    assert (
        report.notes[-1]
        == f"{2 * SHARD_ROWS} rows encoded anew, {2 * SHARD_ROWS} of them bit for bit"
    )


def test_the_source_may_lie_elsewhere(finished: Path, run_dir: Path, data: Path, tmp_path: Path):
    moved = shutil.copytree(data, tmp_path / "moved")
    assert check(finished, run_dir, source=str(moved), tasks=1).problems == []


@pytest.mark.parametrize(
    "change", [{"step": 1}, {"weights": "raw"}, {"step": 1, "weights": "raw"}], ids=str
)
def test_a_manifest_that_names_another_checkpoint(
    finished: Path, run_dir: Path, tmp_path: Path, change: dict[str, Any]
):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    manifest = json.loads((out / "manifest.json").read_bytes())
    manifest["fingerprint"]["model"] |= change
    (out / "manifest.json").write_text(json.dumps(manifest))
    seal(out)
    assert verify_export(out).problems == []
    (problem,) = check(out, run_dir).problems
    assert problem.startswith("model.encoder_sha256: the export has '")
    assert str(run_dir) in problem


def test_another_run_of_the_same_architecture(finished: Path, other_run: Path):
    (problem,) = check(finished, other_run).problems
    assert problem.startswith("model.encoder_sha256: the export has '")


def test_a_run_of_another_architecture(finished: Path, data: Path, tmp_path: Path):
    run = make_run(tmp_path / "run", data, {"bottleneck": {"kind": "gaussian", "size": 5}})
    problems = "\n".join(check(finished, run).problems)
    for name in ("model.architecture.bottleneck.size", "output.latent_shape", "encoder_sha256"):
        assert name in problems


def test_a_run_on_other_data(finished: Path, tmp_path: Path):
    data = make_data(tmp_path / "data", shards=2)
    run = make_run(tmp_path / "run", data, GAUSSIAN)
    (problem,) = check(finished, run).problems
    assert problem.startswith("data.dataset_id: the export has '")


@pytest.mark.parametrize(
    "settings", [{"step": 1}, {"weights": "raw"}, {"precision": "bf16"}, {"run": "other"}], ids=str
)
def test_latents_of_another_model_behind_fitting_hashes(
    run_dir: Path,
    other_run: Path,
    data: Path,
    forged: Callable[[Path], Path],
    tmp_path: Path,
    settings: dict[str, Any],
):
    run = other_run if settings.pop("run", None) else run_dir
    assert run_export(make_config(run, tmp_path / "theirs", **settings)) == DONE
    out = forged(tmp_path / "theirs")
    assert verify_export(out, source=data).problems == []
    problems = check(out, run_dir).problems
    assert len(problems) >= NUM_SHARDS
    pattern = "shard-000000: mu is not what the model gives, by up to "
    assert any(problem.startswith(pattern) for problem in problems)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_a_single_latent_that_is_another(
    finished: Path, run_dir: Path, tmp_path: Path, value: float
):
    out = Path(shutil.copytree(finished, tmp_path / "out"))

    def change(rows: Rows) -> Rows:
        mu = rows.latents["mu"].copy()
        mu[5, 1] = value
        return Rows(**vars(rows) | {"latents": {**rows.latents, "mu": mu}})

    rewrite(out, change)
    seal(out)
    problems = check(out, run_dir).problems
    assert any(p.startswith("shard-000002: mu is not what the model gives") for p in problems)
    assert not any(p.startswith("shard-000003") for p in problems)


def test_rows_of_other_keys_and_rows_without_a_field(finished: Path, run_dir: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))

    def reverse(rows: Rows) -> Rows:
        return Rows(**vars(rows) | {"keys": rows.keys[::-1]})

    def cut(rows: Rows) -> Rows:
        return Rows(**vars(rows) | {"latents": {"mu": rows.latents["mu"]}})

    rewrite(out, reverse)
    seal(out)
    assert any(p.startswith("shard-000002: its keys") for p in check(out, run_dir).problems)
    rewrite(out, cut)
    seal(out)
    rewrite(out, lambda rows: Rows(**vars(rows) | {"keys": rows.keys[::-1]}))
    problems = check(out, run_dir).problems
    assert "shard-000002: no logvar of the shape (3,)" in problems


def test_a_file_that_cannot_be_read_is_a_problem(finished: Path, run_dir: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "data/tar/shard-000002.tar").unlink()
    problems = check(out, run_dir).problems
    assert "data/tar/shard-000002.tar is missing" in problems
    assert sum(problem.startswith("shard-000002: ") for problem in problems) == 1


def test_without_a_manifest_nothing_is_encoded(finished: Path, run_dir: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for content in (None, b"{}", b"not JSON"):
        (out / "manifest.json").unlink()
        if content is not None:
            (out / "manifest.json").write_bytes(content)
        report = check(out, run_dir)
        assert any("manifest.json" in problem for problem in report.problems)
        assert report.notes == ["nothing was encoded anew: the manifest is missing or damaged"]
        (out / "manifest.json").touch()


def test_a_store_of_samples_is_not_that_of_a_model_without_variance(
    run_dir: Path, data: Path, tmp_path: Path
):
    assert run_export(make_config(run_dir, tmp_path / "out", store="sample")) == DONE
    other = make_run(tmp_path / "run", data, {"bottleneck": {"kind": "deterministic", "size": 3}})
    with pytest.raises(UserError, match="deterministic bottleneck"):
        check(tmp_path / "out", other)


def test_the_command(
    finished: Path,
    run_dir: Path,
    other_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    def verify(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        argv = ["verify", finished, "--level", "encode", "--json", *arguments]
        code = main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if code != WRONG_USE else {"error": printed.err}

    code, report = verify("--run", run_dir, "--tasks", "1")
    assert (code, report["problems"]) == (DONE, [])
    assert report["notes"][-1] == "16 rows encoded anew, 16 of them bit for bit"
    code, report = verify("--run", other_run)
    assert code == FAILED
    assert "model.encoder_sha256" in report["problems"][0]
    code, report = verify()
    assert code == WRONG_USE
    assert report["error"].startswith("error: The level encode needs the model: give its run ")
    code, report = verify("--run", tmp_path)
    assert code == WRONG_USE
    assert "is no run directory" in report["error"]
