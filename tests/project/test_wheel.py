"""The wheel is complete: built from the sdist, installed into a folder, used from an empty one."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.docs.blocks import blocks_of
from tests.docs.reader import make_photos, make_shims, type_blocks, typed
from tests.processes import ROOT
from tests.project.test_readme import tracked

pytestmark = pytest.mark.slow
# The files from which a wheel is built.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "latentmill", "launch", "pipeline")
SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
FOREIGN = "from pathlib import Path\nPath({!r}).touch()\nraise SystemExit('the foreign one')\n"


@dataclass(frozen=True)
class Installed:
    """The wheel, the folder it is installed in, and an empty working folder."""

    wheel: Path
    target: Path
    empty: Path

    @property
    def env(self) -> dict[str, str]:
        """Environment of a shell that finds the installation, and nothing of the repository."""
        path = f"{self.target / 'bin'}{os.pathsep}{os.environ['PATH']}"
        ours = {"PATH": path, "PYTHONPATH": str(self.target), "CUDA_VISIBLE_DEVICES": ""}
        return os.environ | ours | {"OMP_NUM_THREADS": "1"}

    def run(self, *argv: object) -> subprocess.CompletedProcess[str]:
        """Run a command in the empty folder."""
        words = [str(word) for word in argv]
        return subprocess.run(
            words, cwd=self.empty, env=self.env, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source, dist = folder / "source", folder / "dist"
    for name in tracked(*SOURCES, "configs"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", SDIST, dist], cwd=source, check=True, capture_output=True)
    [sdist] = dist.glob("latentmill-*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder / "sdist", filter="data")
    [unpacked] = (folder / "sdist").iterdir()
    pip, offline = [sys.executable, "-m", "pip"], ["--no-deps", "--no-index", "--quiet"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", dist, unpacked]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = dist.glob("*.whl")
    target = folder / "target"
    install = [*pip, "install", *offline, "--no-compile", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    (folder / "empty").mkdir()
    return Installed(wheel, target, folder / "empty")


def test_it_holds_every_module_every_setting_and_nothing_else(installed: Installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = tracked("latentmill", "launch", "pipeline")
    wanted |= {f"latentmill/{name}" for name in tracked("configs")}
    assert found == wanted
    assert {f"{top}/py.typed" for top in ("latentmill", "launch", "pipeline")} <= found


def test_its_metadata_says_what_an_index_shows(installed: Installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        [path] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(wheel.read(path).decode())
    for field in ("Name", "Version", "Summary", "Author", "Keywords", "License-Expression"):
        assert metadata[field], field
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier", [])
    assert "Programming Language :: Python :: 3.11" in classifiers
    assert not [line for line in classifiers if line.startswith("License ::")]  # says the field
    assert {"train", "deepspeed", "onnx", "s3"} <= set(metadata.get_all("Provides-Extra", []))


def test_its_settings_are_listed_and_printed_where_there_is_no_clone(installed: Installed):
    listed = installed.run("latentmill", "config", "--json")
    assert listed.returncode == 0, listed.stderr
    names = {f"{kind}/{name}" for kind, of in json.loads(listed.stdout).items() for name in of}
    files = {name.removeprefix("configs/") for name in tracked("configs")}
    assert names == {name.removesuffix(".yaml") for name in files}
    for name in (
        "train/vae.yaml",
        "export/npy.yaml",
        "accelerate/zero2.yaml",
        "deepspeed/zero2.json",
    ):
        printed = installed.run("latentmill", "config", Path(name).name.removesuffix(".yaml"))
        assert printed.stdout == (ROOT / "configs" / name).read_text()
    where = "import latentmill, pipeline.common.shipped as shipped; print(shipped.FOLDER)"
    found = installed.run(sys.executable, "-c", where).stdout.strip()
    assert found == str(installed.target / "latentmill/configs")
    assert installed.run(sys.executable, "-m", "latentmill", "--version").stdout.startswith(
        "latent"
    )


@pytest.mark.timeout(600)
def test_the_readme_from_top_to_bottom(installed: Installed, tmp_path: Path):
    """All of it in one go, in a folder with photos; only the lengths of trainings are cut."""
    folder, shims = tmp_path / "folder", tmp_path / "bin"
    make_photos(folder / "PHOTOS")
    make_shims(shims, installed.target)
    where = "import latentmill, launch, pipeline, os; print(*(m.__file__ for m in "
    where += "(latentmill, launch, pipeline)), os.environ['PYTHONPATH'], os.getcwd(), sep='\\n')"
    (tmp_path / "where.py").write_text(where)
    code, output = typed([str(shims / "python"), str(tmp_path / "where.py")], folder, shims)
    *files, path, cwd = output.splitlines()
    assert code == 0, output
    assert all(Path(file).is_relative_to(installed.target) for file in files)
    assert (path, cwd) == (str(installed.target), str(folder))
    type_blocks(blocks_of(ROOT / "README.md"), folder, shims)
    for name in ("data/photos", "runs/photos", "exports/photos", "models/photos"):
        assert (folder / name).is_dir()


def test_a_foreign_pipeline_and_launch_beside_it_do_no_harm(
    installed: Installed, tiny_shards: Path, tmp_path: Path
):
    """Two processes train in the folder of another project."""
    touched, empty = tmp_path / "touched", tmp_path / "project"
    (empty / "pipeline").mkdir(parents=True)
    for name in ("pipeline/__init__.py", "launch.py", "latentmill.py"):
        (empty / name).write_text(FOREIGN.format(str(touched)))
    here = Installed(installed.wheel, installed.target, empty)
    small = (f"data.path={tiny_shards}", "--data.decode.size=32", "data.decode.channels=3")
    small += ("num_steps=2", "--batch_size=8", "optimizer.learning_rate.warmup_samples=0")
    trained = here.run("latentmill", "train", "vae", *small, "--processes", 2)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.startswith("2 processes on the CPU; no GPU here\n")
    assert (empty / "runs/vae/outcome.json").exists()
    assert not touched.exists()

    # Not preventable: with -m, Python imports from the current folder before our code runs.
    assert here.run(sys.executable, "-m", "pipeline.train", "vae").returncode == 1
    assert touched.exists()
