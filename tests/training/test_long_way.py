"""The README's "Your own images", typed as it stands there, on real pictures.

Only names and sizes are replaced: the folder, the number of processes, the length of the run.
All Python of the README runs as it is printed.
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
NO_WARMUP = "optimizer.learning_rate.warmup_samples=0"
# In fp32: processors that do not know bf16 are slow in it.
SHORT = f"precision=fp32 num_steps=40 batch_size=32 {NO_WARMUP}"
README = (ROOT / "README.md").read_text()
PYTHON = shlex.quote(sys.executable)
# The README's Python by a word of each block: what it takes as given, an expression to look at
# afterwards, and its value.
PYTHONS = {
    "from_pretrained": (
        "import torch; x = torch.rand(2, 3, 64, 64)",
        "z.shape",
        "torch.Size([2, 10])",
    ),
    "LatentDataset": (
        "",
        "len(latents), z.shape[1:], latents[5].mu.shape",
        f"({NUM_DIGITS}, (10,), (10,))",
    ),
    "wds.WebDataset": ("", "mu.shape, label in range(10)", "((10,), True)"),
    "load_dataset": ("", "len(latents)", f"{NUM_DIGITS}"),
    "pyarrow": ("", "normalised.shape", f"({NUM_DIGITS}, 10)"),
    "OrderedShards": ("", "next(iter(batches))[0].shape", "torch.Size([64, 3, 40, 48])"),
}
RUN_EACH = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"


def write_digits(folder: Path) -> None:
    """Real pictures in class folders, PNG and JPEG by turns, and one that is broken."""
    digits = load_digits()
    for number in range(NUM_DIGITS):
        pixels = (digits.images[number] * (255 / 16)).astype(np.uint8)
        name = "cats" if digits.target[number] == 0 else f"digit {digits.target[number]}"
        path = folder / name / f"{number:04d}.png"
        path = path.with_suffix(".jpg") if number % 2 else path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((48, 40)).save(path)
    (folder / "cats" / "broken.jpg").write_bytes(b"no picture")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a part of the README; commands have no language."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shells() -> list[str]:
    """The blocks of commands below the heading "Your own images"."""
    section = README.split("\n## Your own images\n")[1].split("\n## ")[0]
    return [text for language, text in blocks(section) if language == ""]


def typed(text: str) -> str:
    """The commands of a block, as they run without an installation."""
    text = text.replace("latentmill ", f"{PYTHON} -m pipeline ")
    return re.sub(r"^python ", f"{PYTHON} ", text, flags=re.MULTILINE)


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
@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_readme_on_real_pictures(num_processes: int, tmp_path: Path):
    write_digits(tmp_path / "PHOTOS")
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # as in the project's root
    assert len(shells()) == 7
    pack, index, train, evaluate, export, look_after = (
        typed(text)
        .replace("--processes N --device gpu", f"--processes {num_processes}")
        .replace("precision=bf16", SHORT)
        .replace("/datasets/photos", "data/photos")
        .replace("--out data/photos", "--out data/only-index")
        for text in shells()[:6]  # the last has a test of its own
    )

    packed = run(pack, tmp_path)
    samples = f"OK  {NUM_DIGITS:,} samples in "
    assert packed.startswith(samples)
    assert "; 1 file cannot be read\n" in packed
    assert run(index, tmp_path).startswith(samples)

    run(train, tmp_path)
    outcome = json.loads((tmp_path / "runs/photos/outcome.json").read_text())
    assert (outcome["status"], outcome["step"]) == ("done", 40)
    assert "eval_ema/squared_error" in run(evaluate, tmp_path)

    exported = run(f"set -e\n{export}", tmp_path)
    assert re.search(r"^OK  .*, each exactly once, ", exported, re.MULTILINE)
    assert re.search(r"^label +latents +accuracy", exported, re.MULTILINE)
    assert re.search(r"^label +pixels +accuracy", exported, re.MULTILINE)
    told = run(f"set -e\n{look_after}", tmp_path)
    assert re.search(rf"^committed +{NUM_DIGITS:,} of {NUM_DIGITS:,} rows, ", told, re.MULTILINE)
    assert re.search(r"^each task once by +hard links", told, re.MULTILINE)
    check_pythons(tmp_path)


def check_pythons(cwd: Path) -> None:
    """Run all Python of the README, each block by itself, and look at what it made."""
    pythons = [text for language, text in blocks(README) if language == "python"]
    assert len(pythons) == len(PYTHONS)
    files, expected = list[str](), list[str]()
    for number, text in enumerate(pythons):
        (word,) = [word for word in PYTHONS if word in text]
        given, look, value = PYTHONS[word]
        files.append(f"block-{number}.py")
        (cwd / files[-1]).write_text(f"{given}\n{text}\nprint('MADE', ({look}))\n")
        expected.append(value)
    printed = run(f"{PYTHON} -c {shlex.quote(RUN_EACH)} {' '.join(files)}", cwd)
    assert re.findall(r"^MADE (.*)$", printed, re.MULTILINE) == expected


@pytest.mark.distributed
def test_readme_flow(tmp_path: Path):
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "docs").mkdir()
    short = typed(shells()[-1]).replace("--count 50000", "--count 600")
    few = f"num_steps=4 {NO_WARMUP}"
    short = re.sub(r"num_steps=\d+", few, short).replace("precision=bf16", "precision=fp32")
    short = re.sub(r"latent_flow.png \d+", "latent_flow.png 2", short)
    assert short.count("600") == short.count(few) == short.count(".png 2\n") == 1
    assert "epoch 2: loss" in run(f"set -e\n{short}", tmp_path)
    made, shown = (Image.open(root / "docs/latent_flow.png") for root in (tmp_path, ROOT))
    with made, shown:
        assert (made.size, made.mode) == (shown.size, shown.mode)
