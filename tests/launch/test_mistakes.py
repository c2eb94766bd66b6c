"""Mistakes that the launchers report before they submit anything; and submission."""

import os
import re
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.job import Job, JobError
from tests.launch.texts import EXPORT, POD, TRAIN
from tests.processes import ROOT

MISTAKES = {
    "no such config": (
        ["slurm", "vea"],
        "The config file vea does not exist, and no settings of that name are shipped. Did you "
        "mean vae? Shipped are ae, beta_vae, dae, decoder_finetune,",
    ),
    "no such topology": (
        ["slurm", TRAIN[0], "--topology", "zero4"],
        "The topology file zero4 does not exist, and no settings of that name are shipped. Did "
        "you mean zero3? Shipped are cpu-ddp, gpu-ddp, multi-node, single-cpu, zero1, zero2, zero3",
    ),
    "no nodes": (["slurm", TRAIN[0], "--nodes", "0"], "--nodes must be at least 1, not 0."),
    "no processes": (["slurm", TRAIN[0], "--gpus-per-node", "0"], "--gpus-per-node must be at lea"),
    "no time": (["slurm", TRAIN[0], "--time", "8h"], "--time '8h' is not a time: write HH:MM:SS"),
    "all grace": (
        ["slurm", TRAIN[0], "--time", "00:02:00", "--grace", "120"],
        "--time gives the job 120 s, of which --grace takes 120 s",
    ),
    "no grace": (["slurm", TRAIN[0], "--grace", "0"], "--grace must be at least 1, not 0."),
    "restarts": (["slurm", TRAIN[0], "--max-restarts", "-1"], "--max-restarts must be at least 0"),
    "no name": (
        ["slurm", TRAIN[0], "--name", "Big_Run"],
        "--name 'Big_Run' is not a valid name for a job",
    ),
    "no variable": (
        ["slurm", TRAIN[0], "--env", "NCCL_DEBUG"],
        "--env 'NCCL_DEBUG' is not a variable",
    ),
    "two strategies": (
        *(["slurm", TRAIN[0], "--strategy", "zero1", "--topology", "pyproject.toml"],),
        "--topology pyproject.toml decides the strategy itself: leave out either --strategy zero1",
    ),
    "no run_dir": (["slurm", "constraints.txt"], "constraints.txt names no run_dir: set it there"),
    "run_dir no directory": (
        ["slurm", TRAIN[0], "run_dir=s3://bucket/vae"],
        "run_dir is 's3://bucket/vae', but must be a path of this machine or of a mounted file",
    ),
    "no out": (
        ["slurm", TRAIN[0], "--module", "pipeline.export"],
        "configs/train/vae.yaml names no out: set it there",
    ),
    "in the pod": (
        ["k8s", TRAIN[0], *POD],
        "run_dir is runs/vae, outside --mount /data, and would be lost with the pod: add "
        "run_dir=/data/vae",
    ),
    "out of the claim": (["k8s", TRAIN[0], *POD, "run_dir=/data/../vae"], "/vae, outside --mount"),
    "no size": (["k8s", TRAIN[0], *POD, "--memory", "64 GB"], "--memory '64 GB' is not an amount"),
    "no mount": (["k8s", TRAIN[0], *POD, "--mount", "data"], "--mount data must be an absolute"),
    "uneven": (["local", TRAIN[0], "--processes", "0"], "--processes must be at least 1, not 0."),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_paragraph_and_exit_code_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_processes_that_do_not_divide_over_nodes_are_refused():
    with pytest.raises(JobError, match="5 processes do not divide evenly over --nodes 2"):
        Job(config=ROOT / TRAIN[0], num_processes=5, num_nodes=2)


@pytest.mark.parametrize("strategy", [[], ["--strategy", "zero2"]], ids=["ddp", "zero2"])
def test_a_job_is_described_from_anywhere_by_names_alone(
    strategy: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "vae", "--nodes", "2", *strategy]) == 0
    printed = capsys.readouterr().out
    named = re.findall(r"\S*configs/\S+", printed)
    assert len(named) == 2 + len(strategy[1:])
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [["slurm"], ["k8s", *POD]], ids=["sbatch", "kubectl"])
class TestSubmitting:
    """With a stand-in for sbatch and kubectl; test_slurm.py has the real Slurm."""

    @pytest.fixture
    def submitted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where the stand-ins leave what they read; the file `refuse` makes them fail."""
        monkeypatch.chdir(ROOT)
        programs = tmp_path / "bin"
        programs.mkdir()
        for name in ("sbatch", "kubectl"):
            program = programs / name
            program.write_text(
                f"#!/bin/bash\ncd {tmp_path} || exit\n[[ -e refuse ]] && exit 1\n"
                'echo "$@" >arguments\ncat >submitted\n'
            )
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "submitted"

    def command(self, place: list[str], folder: Path) -> list[str]:
        mount = ["--mount", str(folder)] if place[0] == "k8s" else []
        return [*place, *EXPORT, f"out={folder / 'latents'}", *mount, "--submit"]

    def test_what_is_printed_is_submitted(
        self,
        place: list[str],
        submitted: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ):
        assert main(self.command(place, tmp_path)) == 0
        assert capsys.readouterr().out.rstrip("\n") == submitted.read_text().rstrip("\n")
        expected = {"slurm": "", "k8s": "apply -f -"}[place[0]]
        assert (tmp_path / "arguments").read_text().strip() == expected

    def test_a_refusal_comes_back(self, place: list[str], submitted: Path, tmp_path: Path):
        (tmp_path / "refuse").touch()
        assert main(self.command(place, tmp_path)) == 1
        assert not submitted.exists()

    def test_without_the_program_it_says_what_to_do(
        self,
        place: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert main(self.command(place, tmp_path)) == 2
        assert f"--submit needs {'sbatch' if place[0] == 'slurm' else 'kubectl'}, which is not" in (
            capsys.readouterr().err
        )

    @pytest.mark.slow
    def test_a_mistake_in_the_config_is_reported_and_nothing_is_submitted(
        self, place: list[str], submitted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        run = tmp_path / "run"
        mount = ["--mount", str(tmp_path)] if place[0] == "k8s" else []
        argv = [*place, TRAIN[0], f"run_dir={run}", *mount, "sed=3", "--submit"]
        assert main(argv) == 2
        told = capfd.readouterr().err
        assert "sed: unknown key (got 3); did you mean 'seed'?" in told
        assert "add --unchecked: then the job checks the config" in told
        assert not submitted.exists()
        assert not run.exists()

        assert main([*argv, "--unchecked"]) == 0
        assert "sed=3" in submitted.read_text()
