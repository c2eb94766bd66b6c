"""The notebooks run from their first cell to their last, in one interpreter and an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import CPU_ENV, ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FIRST_STEPS = ROOT / "examples" / "first_steps.ipynb"


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    """The cells of a kind."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def program(path: Path) -> str:
    """The code of all cells; a line `!COMMAND` runs it, as in Jupyter, and must succeed."""
    lines = ["import subprocess"]
    for cell in cells(path):
        for line in "".join(cell["source"]).splitlines():
            argv = shlex.split(line[1:]) if line.startswith("!") else None
            lines.append(line if argv is None else f"subprocess.run({argv}, check=True)")
    return "\n".join(lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_printed(path: Path):
    content = json.loads(path.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert all(cell["outputs"] == [] for cell in cells(path))
    assert all(cell["execution_count"] is None for cell in cells(path))
    assert path.read_text() == json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    assert len(cells(path, "markdown")) >= 2
    compile(program(path), str(path), "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of training, and three starts of Python
def test_the_first_steps(tmp_path: Path):
    (tmp_path / "first_steps.py").write_text(program(FIRST_STEPS))
    (tmp_path / "work").mkdir()
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "first_steps.py"],
        cwd=tmp_path / "work",
        env=os.environ | CPU_ENV | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error = re.search(r"^squared error per picture: ([\d.]+)$", done.stdout, re.MULTILINE)
    assert error, done.stdout
    assert float(error[1]) < 15  # of the mean picture: 60
    assert "LatentDataset('latents/first': 4,000 rows, mu + logvar [10] float32" in done.stdout
