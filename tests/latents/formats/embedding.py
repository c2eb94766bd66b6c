"""embedding-reader, beside what is installed: it asks for an older pandas, and works with ours."""

import subprocess
import sys
from pathlib import Path

import pytest

RELEASE = "embedding-reader==1.8.1"


def pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def embedding_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that it is imported from."""
    folder = tmp_path_factory.mktemp("embedding-reader")
    asked = pip("download", "--dest", folder / "asked", "fsspec")
    if asked.returncode:
        pytest.skip(f"pip reaches no packages here: {asked.stderr.strip().splitlines()[-1]}")
    done = pip("install", "--target", folder / "installed", RELEASE)
    assert done.returncode == 0, done.stderr
    return folder / "installed"
