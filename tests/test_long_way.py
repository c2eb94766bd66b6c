"""The README's "Your own images", typed as it stands there, on real pictures.

Only names and sizes are replaced: the folder, the number of processes, the length of the run.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.processes import CPU_ENV, ROOT

NUM_DIGITS = 300
SHORT = "num_steps=40 batch_size=32 optimizer.learning_rate.warmup_samples=0"
PYTHON = shlex.quote(sys.executable)


def write_digits(folder: Path) -> None:
    """Real pictures in class folders, PNG and JPEG by turns, and one that is broken."""
    digits = load_digits()
    for number in range(NUM_DIGITS):
        pixels = (digits.images[number] * (255 / 16)).astype(np.uint8)
        path = folder / f"digit {digits.target[number]}" / f"{number:04d}.png"
        path = path.with_suffix(".jpg") if number % 2 else path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((48, 40)).save(path)
    (folder / "digit 0" / "broken.jpg").write_bytes(b"no picture")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks below the heading "Your own images"."""
    section = (ROOT / "README.md").read_text().split("\n## Your own images\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run(command: str, cwd: Path) -> str:
    ended = subprocess.run(
        command,
        shell=True,
        cwd=cwd,
        env=CPU_ENV | {"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_readme_on_real_pictures(num_processes: int, tmp_path: Path):
    write_digits(tmp_path / "PHOTOS")
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # as in the project's root
    shells = [text for language, text in blocks() if language == ""]
    # Those of other libraries; tests of their own have those that load our modules.
    pythons = [t for language, t in blocks() if language == "python" and t.startswith("import")]
    assert (len(shells), len(pythons)) == (5, 3)
    pack, index, train, evaluate, export = (
        text.replace("--processes N --device gpu", f"--processes {num_processes}")
        .replace("latentmill ", f"{PYTHON} -m pipeline ")
        .replace("python -m launch", f"{PYTHON} -m launch")
        .replace("precision=bf16", f"precision=bf16 {SHORT}")
        .replace("/datasets/photos", "data/photos")
        .replace("--out data/photos", "--out data/only-index")
        for text in shells
    )

    packed = run(pack, tmp_path)
    assert re.search(r"^num broken +1$", packed, re.MULTILINE)
    assert re.search(rf"^num samples +{NUM_DIGITS}$", packed, re.MULTILINE)
    assert re.search(rf"^num samples +{NUM_DIGITS}$", run(index, tmp_path), re.MULTILINE)

    run(train, tmp_path)
    outcome = json.loads((tmp_path / "runs/photos/outcome.json").read_text())
    assert (outcome["status"], outcome["step"]) == ("done", 40)
    assert "eval_ema/squared_error" in run(evaluate, tmp_path)

    exported = run(f"set -e\n{export}", tmp_path)
    assert re.search(r"^problems +-$", exported, re.MULTILINE)
    assert re.search(r"^label +latents +accuracy", exported, re.MULTILINE)
    assert re.search(r"^label +pixels +accuracy", exported, re.MULTILINE)
    for number, text in enumerate(pythons):
        code = f"{text}\nprint('LOADED', {('len(mu)', 'len(latents)', 'normalised.shape')[number]})"
        (tmp_path / "load.py").write_text(code)
        loaded = run(f"{PYTHON} load.py", tmp_path)
        assert ("LOADED 10", f"LOADED {NUM_DIGITS}", f"LOADED ({NUM_DIGITS}, 10)")[number] in loaded
