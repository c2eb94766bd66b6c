"""The command line as a person meets it: help, reports, JSON, errors, exit codes."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.__main__ import build_parser, main
from pipeline.common.arguments import size
from tests.processes import ROOT


def verbs_below(parser: argparse.ArgumentParser, *above: str) -> Iterator[list[str]]:
    """Every verb and part of a verb that a parser knows, as typed."""
    for action in parser._actions:
        for name, below in (action.choices or {}).items() if has_parsers(action) else ():
            yield [*above, name]
            yield from verbs_below(below, *above, name)


def has_parsers(action: argparse.Action) -> bool:
    return isinstance(action, argparse._SubParsersAction)


NAMES = [name for (name,) in verbs_below(build_parser(None))]
VERBS = [verb for name in NAMES for verb in verbs_below(build_parser(name)) if verb[0] == name]
LATENTMILL = [sys.executable, "-m", "pipeline"]


def cli(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    argv = [*LATENTMILL, *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_the_help_lists_every_verb():
    shown = re.findall(r"^    ([\w-]+)(?: |$)", build_parser(None).format_help(), re.MULTILINE)
    assert shown == NAMES
    assert ["pack", "sprites"] in VERBS
    assert ["export", "verify"] in VERBS


@pytest.mark.parametrize("verb", [[], *VERBS], ids=" ".join)
def test_help_loads_nothing_heavy(verb: list[str]):
    heavy = ["torch", "sklearn", "accelerate", "datasets", "webdataset", "wandb"]
    if verb[:1] != ["pack"]:  # its options are the settings of its sources
        heavy += ["numpy", "pyarrow", "pydantic", "PIL"]
    code = (
        "import sys, time; from pipeline.__main__ import main\n"
        f"try: main({[*verb, '--help']})\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('HEAVY', [name for name in {heavy} if name in sys.modules])"
    )
    argv = [sys.executable, "-c", code]
    printed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("usage: latentmill")
    assert printed.endswith("HEAVY []\n")


@pytest.mark.parametrize("verb", [[], *VERBS], ids=" ".join)
def test_help_of_the_installed_script_answers_at_once(verb: list[str]):
    script = Path(sys.executable).with_name("latentmill")
    if not script.exists():
        pytest.skip(f"{script.name} is not installed beside this Python: run under `make test`")
    limit = 1.5 if verb[:1] == ["pack"] else 0.5  # `pack` loads numpy, pyarrow, pydantic and Pillow
    for _ in range(3):  # the best of three, of processor time: other tests may be using the cores
        started = sum(os.times()[2:4])
        subprocess.run([script, *verb, "--help"], capture_output=True, check=True)
        seconds = sum(os.times()[2:4]) - started
        if seconds < limit:
            return
    pytest.fail(f"{seconds:.2f} s")


def test_version():
    assert cli("--version").stdout == "latentmill 0.1.0\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1000", 1000), ("64K", 65536), ("256MiB", 2**28), ("2G", 2**31), ("1T", 2**40)],
)
def test_sizes(text: str, expected: int):
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "K", "1.5G", "-1", "10X", "MiB"])
def test_a_wrong_size_is_wrong_use(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "folder", "a", "b", f"--shard-bytes={text}"])
    assert "write 1000000, 64K, 256M or 2G" in capsys.readouterr().err


def test_pack_and_index_report_as_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shards = tmp_path / "shards"
    options = ["--count", "20", "--shard-samples", "8", "--workers", "1", "--seed", "3"]
    assert main(["pack", "sprites", str(shards), *options, "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert (packed["num_samples"], packed["num_shards"]) == (20, 3)

    split = "{fractions: {train: 0.5, held_out: 0.5}}"
    argv = ["index", str(shards), "--out", str(tmp_path / "i"), "--split", split, "--workers", "1"]
    assert main([*argv, "--json"]) == 0
    indexed = json.loads(capsys.readouterr().out)
    assert indexed["dataset_id"] == packed["dataset_id"]
    assert sum(indexed["num_samples_per_split"].values()) == indexed["num_samples"] == 20
    assert (indexed["damage"], indexed["num_duplicate_keys"]) == ([], 0)

    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("OK  20 samples in 3 shards, ")
    assert f"{'index':<28}{tmp_path / 'i'}" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "{tmp}"], "{tmp}"),
        (["index", "{tmp}", "--split", "{frctions: 3}"], "frctions: unknown key (got 3); did you"),
        (["evaluate", "{tmp}/none"], "{tmp}/none"),
        (["export-model", "{tmp}/none", "{tmp}/out"], "{tmp}/none"),
        (["pack", "folder", "{tmp}/none", "{tmp}/out"], "{tmp}/none"),
        (["pack", "sprites", "{tmp}/out", "--count", "0"], "count"),
        (["verify", "{tmp}/none"], "{tmp}/none"),
        (["probe", "{tmp}/none"], "{tmp}/none"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    code = main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message.replace("{tmp}", str(tmp_path)) in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_verb_is_wrong_use():
    ended = cli("pakc")
    assert ended.returncode == 2
    assert "invalid choice: 'pakc'" in ended.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path):
    shards = tmp_path / "shards"
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -0` does, before anything is printed
    argv = [*LATENTMILL, "pack", "sprites", shards, "--count", "4", "--workers", "1"]
    with os.fdopen(writing, "wb") as stdout:
        ended = subprocess.run(
            argv, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


def test_ctrl_c_is_tidy(tmp_path: Path):
    argv = [*LATENTMILL, "pack", "sprites", tmp_path / "s", "--count", "1000000", "--workers", "1"]
    # A shell's background jobs ignore SIGINT, and so would what they start.
    running = subprocess.Popen(
        argv,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert running.stderr is not None
        running.stderr.readline()  # the first sign of progress
        running.send_signal(signal.SIGINT)
        errors = running.communicate(timeout=60)[1]
    finally:
        running.kill()
    assert running.returncode == 1
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
