"""The examples run as their docstrings say, and go on where they stopped."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pipeline.data.pack import pack_sprites
from tests.processes import ROOT

PLAIN = ROOT / "examples" / "plain_loop.py"


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sprites")
    pack_sprites(folder, count=600, seed=0, shard_samples=100, workers=1)
    return folder


@pytest.fixture(scope="module")
def plain_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_loop", PLAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"squared error ([\d.]+)", text)]


def test_the_plain_loop_goes_on_where_it_stopped(
    sprites: Path, plain_loop: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole, pieces = tmp_path / "whole.pt", tmp_path / "pieces.pt"
    plain_loop.train(str(sprites), whole, 24, save_every=8)
    learned = losses(capsys.readouterr().out)
    for end in (5, 17, 24):  # 9 steps are an epoch
        plain_loop.train(str(sprites), pieces, end, save_every=100)
    one, other = (torch.load(path, weights_only=True) for path in (whole, pieces))
    assert one["data"] == other["data"]
    assert one["data"]["T"] == 24 * 64
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert learned == sorted(learned, reverse=True)


@pytest.mark.slow
def test_the_plain_loop_as_it_is_typed(sprites: Path, tmp_path: Path):
    argv = [sys.executable, PLAIN, sprites, tmp_path / "plain.pt", "--steps", "60"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"step 50: .* per image\nstep 60: .* per image\n", done.stdout)
    assert done.stderr == ""
    again = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout == ""  # done already


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
