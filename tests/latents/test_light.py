"""Reading an export imports no torch, and needs none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.latents.exports import make_rows, write_export
from tests.processes import ROOT

SCRIPT = ROOT / "tests" / "latents" / "reads_without_torch.py"
HEAVY = ("torch", "accelerate", "deepspeed", "wandb", "webdataset")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [make_rows(n, 20) for n in range(3)]
    kinds = ("npy", "safetensors", "parquet", "tar")
    return write_export(tmp_path_factory.mktemp("export"), shards, kinds)


def read(out: Path, *paths: Path) -> str:
    path = os.pathsep.join(map(str, (*paths, ROOT)))
    done = subprocess.run(
        [sys.executable, SCRIPT, out, "0001/00007"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_on_the_way_imports_torch_where_it_is_installed(out: Path):
    assert read(out) == "60 []\n"


def test_an_export_is_read_where_torch_cannot_be_imported(out: Path, tmp_path: Path):
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    code = "import torch"
    failed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "torch is not here" in failed.stderr
    assert read(out, tmp_path) == "60 []\n"
