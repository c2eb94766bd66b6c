"""`latentmill train`, `slurm` and `k8s` as typed: what is chosen, shown, refused and given back."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.gpus import choose
from launch.job import EXPORT, TRAIN, JobError
from pipeline.__main__ import main
from tests.house import copy_house
from tests.launch.runs import write_config
from tests.launch.texts import POD
from tests.processes import ROOT, Result


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("processes", "device", "expected"),
    [
        ("auto", "auto", (1, "cpu", "1 process on the CPU; no GPU here")),
        (3, "auto", (3, "cpu", "3 processes on the CPU; no GPU here")),
        ("auto", "cpu", (1, "cpu", "1 process on the CPU")),
        (2, "cpu", (2, "cpu", "2 processes on the CPU")),
        (8, "gpu", (8, "gpu", "8 processes on GPUs")),  # those of elsewhere, when only printed
    ],
)
def test_what_is_left_to_the_machine(processes: object, device: str, expected: tuple):
    assert choose(processes, device, TRAIN) == expected
    assert choose(processes, device, EXPORT) == expected


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error():
    with pytest.raises(JobError, match="--device gpu, but PyTorch sees no GPU here"):
        choose("auto", "gpu", TRAIN)


def test_counting_gpus_keeps_no_torch():
    code = "import sys; from launch.gpus import num_gpus; num_gpus(); print('torch' in sys.modules)"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "vae", "--procesess", "2"],
        ["train", "vae", "--dry-run=yes"],
        ["train", "vae", "--dry-run", "--submit"],
        ["slurm", "vae", "--submit", "--dry-run"],
        ["export", "run", "tar", "--retry-all"],
    ],
    ids=" ".join,
)
def test_unknown_options_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "error: " in capsys.readouterr().err


def test_a_script_and_a_manifest_come_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "vae", "seed=3", "--nodes", "2", "--monitor.num_images=0"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert "-m pipeline.train" in script
    assert "seed=3 --monitor.num_images=0 &" in script
    argv = ["k8s", "tar", "--export", "run=/data/run", *POD, "out=/data/latents"]
    assert main(argv) == 0
    assert "-m pipeline.export /etc/latentmill/config.yaml" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_python_m_launch_names_the_clone_that_is_not_installed(tmp_path: Path):
    """The trainers do not look into the folder that they start in."""
    house = copy_house(tmp_path / "clone")
    argv = [sys.executable, "-m", "launch", "local", "vae", "--device", "cpu"]
    done = subprocess.run(argv, cwd=house.root, capture_output=True, text=True, check=True)
    assert f"PYTHONSAFEPATH=1 PYTHONPATH={house.root}" in done.stdout
    assert f"-m pipeline.train {house.root}/configs/train/vae.yaml" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("verb", [["train"], ["slurm", "--device", "cpu", "--nodes", "2"]])
def test_a_dry_run_shows_all_and_writes_nothing(
    verb: list[str],
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny_shards, 5)
    before = sorted(tmp_path.rglob("*"))
    argv = [verb[0], str(config), *verb[1:], "--dry-run", "--seed=7"]
    assert main(argv) == 0
    printed = capfd.readouterr()
    assert "accelerate.commands.launch" in printed.out
    assert "\nseed: 7\n" in printed.out
    assert "# samples per epoch" in printed.out
    if verb == ["train"]:
        assert printed.err.startswith("1 process on the CPU; no GPU here\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(
    tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path, tiny_shards, 5)
    argv = ["train", str(config), "--processes", "3", "batch_size=8"]
    text = "error: batch_size 8 is not divisible by 3 processes x accumulation 1 = 3."
    for more in ([], ["--dry-run"]):  # the dry run starts no trainer that could refuse it
        assert main([*argv, *more]) == 2
        assert capfd.readouterr().err.count(text) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_fails_leaves_no_traceback_of_a_launcher(
    run_processes: Callable[..., Result], tiny_shards: Path, tmp_path: Path, num_processes: int
):
    """What only the trainers find: one paragraph, and what accelerate says of it is left out."""
    config = write_config(tmp_path, tiny_shards, 5)
    argv = ("train", config, "--device", "cpu", "--processes", num_processes)
    other = f"run_dir={tmp_path / 'taken'}"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/config.yaml").write_text("seed: [")  # of a run that was cut off
    result = run_processes("pipeline", None, *argv, other)
    assert result.code == 2
    assert result.output.count("error: ") == 1, result.output
    assert "Traceback" not in result.output
