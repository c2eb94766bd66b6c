"""Bad input to an export: one clear paragraph, exit code 2, and no files half-written."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.common import strict
from pipeline.common.errors import DONE, WRONG_USE
from pipeline.config import TrainConfig
from pipeline.data.decode import ArrayDecode
from pipeline.export.__main__ import main
from tests.export.world import make_run, tree


@pytest.fixture
def config(run_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "export.yaml"
    path.write_text(f"run: {run_dir}\nout: {tmp_path}/out\nbatch_size: 6\n")
    return path


@pytest.fixture
def own_run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run_dir, tmp_path / "own"))


@pytest.fixture
def refused(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Start an export that must be refused; return its message."""

    def start(*overrides: str) -> str:
        before = listing(config.parent)
        capsys.readouterr()
        assert main([str(config), *overrides]) == WRONG_USE
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("error: ") == 1
        assert "\n\n" not in printed.err
        assert "Traceback" not in printed.err
        assert listing(config.parent) == before
        return printed.err

    return start


def listing(folder: Path) -> dict[Path, int]:
    """All paths; of files the time of their last write."""
    return {
        path: path.stat().st_mtime_ns if path.is_file() else 0 for path in sorted(folder.rglob("*"))
    }


Refused = Callable[..., str]


def test_this_config_is_a_good_one_otherwise(config: Path):
    assert main([str(config)]) == DONE


def test_a_run_that_is_none(refused: Refused, tmp_path: Path):
    assert f"{tmp_path}/nowhere is no run directory" in refused(f"run={tmp_path}/nowhere")


def test_a_run_without_a_checkpoint(refused: Refused, own_run: Path):
    shutil.rmtree(own_run / "checkpoints")
    text = refused(f"run={own_run}")
    assert f"no checkpoint that verifies in {own_run}/checkpoints" in text


def test_a_step_that_was_not_saved(refused: Refused, run_dir: Path):
    text = refused("step=7")
    assert f"there is no checkpoint {run_dir}/checkpoints/step-7; there: step-1, step-2" in text


def test_a_damaged_checkpoint(refused: Refused, own_run: Path):
    path = own_run / "checkpoints/step-2/ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "checkpoints/step-2 is damaged: " in refused(f"run={own_run}", "step=2")


@pytest.mark.parametrize(
    "former, now, told",
    [
        ("size: 3\n", "size: 4\n", r"encoder\.\S+: \[6, 32\] there, \[8, 32\] by the config"),
        ("- 32\n", "- 48\n", r"encoder\.\S+: \[32, 1024\] there, \[48, 1024\] by the config"),
        ("- 32\n", "- 32\n    - 32\n", r"\[6, 32\] there, \[32, 32\] by"),
        (
            "size: 32\n",
            "size: 16\n",
            r"encoder\.\S+: \[32, 1024\] there, \[32, 256\] by the config",
        ),
        ("3\n    kind: gaussian", "3\n    kind: deterministic", r"\[6, 32\] there, \[3, 32\] by"),
    ],
)
def test_a_checkpoint_of_another_config(
    refused: Refused, own_run: Path, former: str, now: str, told: str
):
    """Somebody has edited config.yaml since."""
    path = own_run / "config.yaml"
    text = path.read_text()
    assert text.count(former) == 1
    path.write_text(text.replace(former, now))
    text = refused(f"run={own_run}")
    assert f"{own_run}/checkpoints/step-2 holds weights of another model than {path}" in text
    assert re.search(told, text), text


def test_a_run_that_kept_no_average(refused: Refused, data: Path, tmp_path: Path):
    run = tmp_path / "run"
    make_run(run, data, {"bottleneck": {"kind": "gaussian", "size": 3}}, has_average=False)
    assert "ask for weights: raw" in refused(f"run={run}")


def test_the_directory_of_another_export(config: Path, refused: Refused, tmp_path: Path):
    assert main([str(config)]) == DONE
    before = tree(tmp_path / "out")
    text = refused("batch_size=7", "dtype=float16", "step=1")
    assert f"{tmp_path}/out holds an export of something else:" in text
    assert "encode.batch_size: there 6, now 7" in text
    assert "output.dtype: there 'float32', now 'float16'" in text
    assert "model.step: there 2, now 1" in text
    assert "Set another out, or give the former settings." in text
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("below", ["", "/out"])
def test_out_is_a_file(refused: Refused, tmp_path: Path, below: str):
    (tmp_path / "file").write_text("precious")
    text = refused(f"out={tmp_path}/file{below}")
    assert f"{tmp_path}/file{below} cannot be written: " in text
    assert "Set out." in text
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("out", ["http://127.0.0.1/out", "https://127.0.0.1:1/out"])
def test_out_is_http(refused: Refused, out: str):
    text = refused(f"out={out}")
    assert f"{out} is read only: HTTP has no way to write files" in text


@pytest.mark.parametrize("out", ["what://x/out", "pipe:cat"])
def test_out_is_of_no_known_store(refused: Refused, out: str):
    assert f"{out}: the scheme" in refused(f"out={out}")


@pytest.mark.parametrize(
    "overrides, messages",
    [
        (["dtype=bfloat16"], ["dtype is 'bfloat16', which parquet cannot hold"]),
        (["dtype=float64"], ["dtype", "float64"]),
        (["formats=[]"], ["formats"]),
        (["formats=[{kind: zarr}]"], ["formats", "zarr"]),
        (["formats=[{kind: tar}, {kind: tar}]"], ["formats name a kind twice: tar, tar"]),
        (["store=samples"], ["store", "samples"]),
        (["views=[hflip]"], ["views is [hflip]"]),
        (["data.split=test"], ["data.split = 'test': the index has the splits"]),
        (["columns={key: int64}"], ["columns names 'key'"]),
        (["max_bad_fraction=2"], ["max_bad_fraction"]),
        (["bach_size=3"], ["bach_size", "did you mean 'batch_size'?"]),
    ],
    ids=str,
)
def test_settings(refused: Refused, overrides: list[str], messages: list[str]):
    text = refused(*overrides)
    for message in messages:
        assert message in text


def test_arrays_are_not_mirrored(refused: Refused, own_run: Path):
    run = strict.load(TrainConfig, own_run / "config.yaml", [])
    arrays = ArrayDecode(shape=(1, 32, 32), range=(0.0, 1.0))
    data = run.data.model_copy(update={"decode": arrays})
    (own_run / "config.yaml").write_text(strict.dump(run.model_copy(update={"data": data})))
    text = refused(f"run={own_run}", "views=[identity, hflip]")
    assert "data.decode.kind is 'array': only images are mirrored. Set views to" in text


def test_a_worker_that_is_not_among_them(refused: Refused):
    assert "--worker 3/3: expected i/n with 0 <= i < n" in refused("--worker", "3/3")


def test_data_that_has_no_index(refused: Refused, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    text = refused(f"data.path={tmp_path}/empty")
    assert f"`latentmill index {tmp_path}/empty`" in text


def test_a_shard_that_is_gone(refused: Refused, data: Path, tmp_path: Path):
    own = shutil.copytree(data, tmp_path / "shards")
    (own / "shard-000003.tar").unlink()
    assert "shard-000003.tar is missing" in refused(f"data.path={own}")
