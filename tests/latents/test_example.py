"""examples/latents.py runs as its docstring says, and goes on where it stopped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.latents.exports import make_rows, write_export
from tests.processes import ROOT

EXAMPLE = ROOT / "examples" / "latents.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents whose first channel tells the label."""
    shards = [make_rows(n, 100) for n in range(4)]
    for rows in shards:
        rows.latents["mu"][:, 0] = rows.labels * rows.valid * 3
        rows.latents["logvar"][:] = -2.0
        rows.latents["logvar"][~rows.valid] = 0
    return write_export(tmp_path_factory.mktemp("export"), shards, ["parquet"])


def run(out: Path, checkpoint: Path, epochs: int) -> list[float]:
    argv = [sys.executable, str(EXAMPLE), str(out), str(checkpoint), str(epochs)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [float(value) for value in re.findall(r"epoch \d+: cross-entropy ([\d.]+)", done.stdout)]


@pytest.mark.slow
def test_the_example_learns_and_goes_on_where_it_stopped(out: Path, tmp_path: Path):
    losses = run(out, tmp_path / "whole.pt", 4)
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 1.5
    assert len(run(out, tmp_path / "pieces.pt", 1)) == 1
    assert run(out, tmp_path / "pieces.pt", 4) == losses[1:]
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "pieces"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 60
