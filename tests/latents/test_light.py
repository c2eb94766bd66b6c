"""Reading an export imports no torch, and needs none: a plain `pip install latentmill` will do."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.data.storage.conftest import s3, s3_endpoint
from tests.data.storage.fault_server import FaultServer, serving
from tests.latents.exports import make_rows, write_export
from tests.latents.test_remote import files_of
from tests.processes import ROOT

__all__ = ["s3", "s3_endpoint"]  # fixtures

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


RELEASED = ROOT / "tests" / "released" / "93dd2d6" / "export"  # in all formats
REPORTS = {
    "verify": "OK  40 rows, each exactly once, ",
    "export verify": "OK  40 rows, each exactly once, ",
    "export status": "OK  finished: 40 rows in 3 tasks",
    "export gc": "OK  removed 0 files, 0 B, from ",
    "export finalize": "OK  finished: 40 rows in 3 tasks, in ",
}
# Of the extra; what the others of `LIGHT` import of their own accord is not asked.
EXTRA = (*HEAVY, "cv2", "PIL", "psutil", "safetensors", "simplejpeg", "sklearn", "yaml")


@pytest.mark.parametrize("verb", REPORTS)
def test_an_export_is_looked_after_without_the_extra(tmp_path: Path, verb: str):
    without = tmp_path / "without"
    without.mkdir()
    for name in EXTRA:
        (without / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    out = shutil.copytree(RELEASED, tmp_path / "export")
    done = python("-m", "pipeline", *verb.split(), out, path=without)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(REPORTS[verb])


def test_another_missing_module_is_no_light_installation(tmp_path: Path):
    (tmp_path / "webdataset.py").write_text("import no_such_module\n")
    done = python("-m", "pipeline", "pack", "sprites", tmp_path / "shards", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


class Environment:
    """A fresh virtual environment and a copy of what is installed into it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "venv" / "bin"
        self.folder = folder
        self.source = folder / "source"
        self.source.mkdir()
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "setup.py"):
            shutil.copy(ROOT / name, self.source)
        for name in ("configs", "latentmill", "launch", "pipeline"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.source / name, ignore=ignored)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, in a folder that holds no Python."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            env=variables | {"no_proxy": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def pip(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run pip with our pins, by this machine's settings as `make setup` does."""
        pins = ("--constraint", self.source / "constraints.txt")
        return self.run("python", "-m", "pip", arguments[0], "--quiet", *pins, *arguments[1:])


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What `pip install latentmill` gives."""
    made = Environment(tmp_path_factory.mktemp("light"))
    asked = made.pip("download", "--no-deps", "--dest", made.folder / "asked", "fsspec")
    if asked.returncode:
        pytest.skip(f"pip reaches no packages here: {asked.stderr.strip().splitlines()[-1]}")
    done = made.pip("install", "--no-compile", made.source)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.slow
def test_a_plain_installation_reads_exports(light: Environment, out: Path):
    assert "No module named 'torch'" in light.run("python", "-c", "import torch").stderr
    done = light.run("python", "-c", "import latentmill; latentmill.LatentDataset")
    assert (done.returncode, done.stderr) == (0, "")
    done = light.run("python", SCRIPT, out, "0001/00007")
    assert (done.stdout, done.stderr) == (FOUND, "")
    with serving(FaultServer(files_of(out))) as server:
        done = light.run("python", SCRIPT, server.url, "0001/00007")
        assert (done.stdout, done.stderr) == (FOUND, "")
        assert server.requests


@pytest.mark.slow
def test_a_plain_installation_shows_the_help(light: Environment):
    done = light.run("latentmill", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: latentmill ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("latentmill pack sprites shards", "PIL"),
        ("latentmill bench data vae", "torch"),
        ("python -m pipeline.train config.yaml", "torch"),
        ("python -m pipeline.export config.yaml", "torch"),
        ("python -m pipeline.commands.demo", "torch"),
        ("python -m launch local config.yaml", "psutil"),
    ],
)
def test_a_plain_installation_says_what_more_it_takes(
    light: Environment, command: str, missing: str
):
    done = light.run(*command.split())
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: not installed here: ")
    assert missing in line
    assert "`pip install 'latentmill[train]'`" in line


@pytest.mark.slow
def test_the_extra_s3_reads_from_there(
    light: Environment, out: Path, s3: Callable[[Path, str], str]
):
    """The last one: it adds to the environment."""
    url = s3(out, "light")
    done = light.run("python", SCRIPT, url, "0001/00007")
    assert "install latentmill[s3]" in done.stderr
    done = light.pip("install", "--no-compile", f"{light.source}[s3]")
    assert done.returncode == 0, done.stderr
    done = light.run("python", SCRIPT, url, "0001/00007")
    assert (done.stdout, done.stderr) == (FOUND, "")
