"""Reading an export imports no torch, and needs none."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.latents.exports import make_rows, write_export
from tests.processes import ROOT

SCRIPT = ROOT / "tests" / "latents" / "reads_without_torch.py"
HEAVY = ("torch", "accelerate", "deepspeed", "wandb", "webdataset")
LIGHT = (
    *("numpy", "pyarrow", "fsspec", "urllib3"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
)
FOUND = "60 []\n"  # rows; heavy packages that were imported


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [make_rows(n, 20) for n in range(3)]
    kinds = ("npy", "safetensors", "parquet", "tar")
    return write_export(tmp_path_factory.mktemp("export"), shards, kinds)


def python(*argv: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an interpreter that finds modules in `path` before all others, and ours."""
    folders = os.pathsep.join(str(folder) for folder in (path, ROOT) if folder)
    environment = os.environ | {"PYTHONPATH": folders}
    return subprocess.run(
        [sys.executable, *argv], env=environment, capture_output=True, text=True, check=False
    )


def test_nothing_on_the_way_imports_torch_where_it_is_installed(out: Path):
    done = python(SCRIPT, out, "0001/00007")
    assert (done.stdout, done.stderr) == (FOUND, "")


def test_an_export_is_read_where_torch_cannot_be_imported(out: Path, tmp_path: Path):
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    assert "torch is not here" in python("-c", "import torch", path=tmp_path).stderr
    done = python(SCRIPT, out, "0001/00007", path=tmp_path)
    assert (done.stdout, done.stderr) == (FOUND, "")


def test_a_light_environment_is_all_that_is_needed(out: Path, tmp_path: Path):
    """One with nothing else: without site-packages, and what is needed linked into a folder."""
    for name in LIGHT:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin)
        package = package.parent if package.name == "__init__.py" else package
        for part in (package, package.with_name(f"{name}.libs")):
            if part.exists():
                (tmp_path / part.name).symlink_to(part)
    assert "No module" in python("-S", "-c", "import torch", path=tmp_path).stderr
    done = python("-S", SCRIPT, out, "0001/00007", path=tmp_path)
    assert (done.stdout, done.stderr) == (FOUND, "")
