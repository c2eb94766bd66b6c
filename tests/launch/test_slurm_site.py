"""Slurm as sites have it: options of sbatch, a file of variables, containers by pyxis."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.slurm_script import READ_ENV_FILE
from tests.launch.texts import TRAIN
from tests.processes import ROOT

Run = Callable[..., str]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """What is printed for some options; with code=2, the message of a refusal."""
    monkeypatch.chdir(ROOT)

    def run(*options: str, config: Path | str = TRAIN[0], code: int = 0) -> str:
        assert main(["slurm", str(config), *options]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def test_options_of_sbatch_are_passed_on_in_either_spelling(script: Run):
    given = ("account=physics", "--qos=high", "-C ib", "reservation=course", "exclusive")
    lines = script(*(f"--sbatch={option}" for option in given)).splitlines()
    wanted = ["--account=physics", "--qos=high", "-C ib", "--reservation=course", "--exclusive"]
    assert [line for line in lines if line.startswith("#SBATCH")][-5:] == [
        f"#SBATCH {option}" for option in wanted
    ]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("comment=two words", "--comment='two words'"),
        ("--comment=two words", "--comment='two words'"),
        ("comment='two words'", "--comment='two words'"),  # as people have worked around it
        ("comment=a#b", "--comment='a#b'"),
    ],
)
def test_a_value_with_spaces_is_one_value(given: str, written: str, script: Run):
    assert f"#SBATCH {written}" in script(f"--sbatch={given}").splitlines()


@pytest.mark.parametrize(
    "words", [["--sbatch", "comment=a\nrm -r b"], ["--partition", "a\nb"], ["run_dir=a\nb"]]
)
def test_a_line_break_is_refused(words: list[str], script: Run):
    assert "is no option for sbatch: it holds a line break" in script(*words, code=2)


@pytest.mark.parametrize(
    "option", ["gres=gpu:h100:8", "gpus-per-node=h100:8", "gres=lscratch:9,gpu:8", "-G 8"]
)
def test_another_option_for_gpus_replaces_ours(option: str, script: Run):
    assert "--gpus-per-node=4" in script("--gpus-per-node", "4", "--sbatch=gres=lscratch:9")
    text = script("--gpus-per-node", "4", f"--sbatch={option}")
    assert len(re.findall("#SBATCH .*gpu|#SBATCH -G", text)) == 1


@pytest.mark.parametrize("option", ["nodes=3", "-N3", "--ntasks-per-node=8", "ntasks=4", "-n 4"])
def test_what_the_script_counts_on_cannot_be_set_otherwise(option: str, script: Run):
    told = script(f"--sbatch={option}", code=2)
    assert f"--sbatch {option}: use --nodes and --gpus-per-node, which the script cou" in told


ENV_FILE = """\
# Keys; made by hand.
PLAIN=abc
EMPTY=
EQUAL=a=b=
SPACED="two words" # a comment
LITERAL='pa$$word'
export EXPORTED=yes
UNICODE=ä
_LAST1=x"""
VALUES = {
    "PLAIN": "abc",
    "EMPTY": "",
    "EQUAL": "a=b=",
    "SPACED": "two words",
    "LITERAL": "pa$$word",
    "EXPORTED": "yes",
    "UNICODE": "ä",
    "_LAST1": "x",
}


def read(file: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run the part of the script that reads a file of variables, then a command."""
    text = f"ENV_FILE={shlex.quote(str(file))}{READ_ENV_FILE}{command}"
    return subprocess.run(
        ["bash", "-c", text], cwd=file.parent, capture_output=True, text=True, check=False
    )


def test_a_file_of_variables_is_read_as_the_shell_does(tmp_path: Path):
    file = tmp_path / "my keys.env"
    file.write_text(ENV_FILE)
    done = read(file, "NOT_EXPORTED=1; env --null")
    assert done.returncode == 0, done.stderr
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    assert {name: found.get(name) for name in VALUES} == VALUES
    assert "NOT_EXPORTED" not in found


@pytest.mark.parametrize(
    "line", ["A=two s3cr3t", "MY-KEY=s3cr3t", "A = s3cr3t", "A=(s3cr3t", "A='s3cr3t"]
)
def test_a_line_that_fails_ends_the_job_and_is_not_shown(line: str, tmp_path: Path):
    file = tmp_path / "keys.env"
    file.write_text(f"# keys\nA=1\n{line}\nB=2\n")
    done = read(file, "env")
    assert (done.returncode > 0, done.stdout) == (True, "")
    # bash names no line where it cannot parse the file.
    where = "" if "(" in line or "'" in line else " line 3"
    words = "fails in bash, whose words may hold a key and are left out"
    assert done.stderr == f"{file}:{where} {words}\n"


def test_a_file_of_variables_that_is_not_there_ends_the_job(
    tmp_path: Path, script: Run, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "none.env"
    done = read(file, "env")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{file}: No such file or directory" in done.stderr
    # The script may be printed elsewhere; before it is submitted, the file is looked for.
    assert f"ENV_FILE={file}\n" in script("--env-file", str(file))
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    argv = ("--env-file", str(file), "--submit", f"run_dir={tmp_path / 'run'}")
    assert script(*argv, code=2) == f"error: --env-file {file} does not exist.\n"
    assert not (tmp_path / "run").exists()


def test_env_wins_over_the_file(script: Run):
    text = script("--env-file", "keys.env", "--env", "A=1")
    assert text.index("ENV_FILE=./keys.env") < text.index("export A=1")


IMAGE = ("--container-image", "registry.example#mill")


def srun_options(text: str) -> dict[str, str]:
    """The options of srun as it gets them, in a folder /here."""
    [_, command] = text.split("\nsrun ")
    words = shlex.split(command.partition(" bash -c ")[0].replace("$PWD", "/here"))
    return dict(word.split("=", 1) for word in words if word.startswith("--"))


def test_a_container_sees_the_folder_the_run_and_the_settings(script: Run, tmp_path: Path):
    config = tmp_path / "my run.yaml"
    config.write_text(f"run_dir: {tmp_path}/runs/x\n")
    mounts = ("--container-mounts", "/data:/data,/a:/my b:ro+rprivate")
    text = script(*IMAGE, *mounts, "--strategy", "zero1", "--env", "A=1", config=config)
    options = srun_options(text)
    assert options["--container-workdir"] == "/here"
    assert options["--container-image"] == "registry.example#mill"
    first, run, *files = options["--container-mounts"].split(",")
    assert (first, run) == ("/here:/here", f"{tmp_path}/runs/x:{tmp_path}/runs/x")
    assert files[-2:] == ["/data:/data", "/a:/my b:ro+rprivate"]
    paths = [file.partition(":")[0] for file in files[:-2]]
    assert files[:-2] == [f"{path}:{path}" for path in paths]
    assert [Path(path).name for path in paths] == ["my run.yaml", "zero1.yaml", "zero1.json"]
    variables = options["--container-env"].split(",")
    assert {"A", "OMP_NUM_THREADS", "PYTHONSAFEPATH"} <= {*variables}
    assert {*variables} == {*re.findall(r"^export (\w+)=", text, re.MULTILINE)}
    assert "PYTHONPATH" not in variables
    assert " python \\\n" in text  # the image's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--container-mounts", "/a:/b"], "--container-mounts is of no use without --container-im"),
        ([*IMAGE, "run_dir=../runs/x"], "../runs/x leads out of the container: write it as an abs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_container_that_cannot_be_is_refused(options: list[str], message: str, script: Run):
    told = script(*options, code=2)
    assert message in told
    assert told.count("\n") == 1
