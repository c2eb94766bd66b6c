"""What the examples of downstream use run on: a trained model, and its export in all formats."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from webdataset.writer import TarWriter

from pipeline.data.index import build_index
from pipeline.export.model import export_model
from pipeline.train import main as train
from tests.export.world import make_config, run_export
from tests.processes import CPU_ENV, ROOT

NUM_DIGITS, SHARD_DIGITS = 1000, 250
BROKEN = "0123"  # its picture cannot be decoded
LATENT_SIZE = 8
FORMATS = [{"kind": kind} for kind in ("tar", "parquet", "npy", "safetensors")]


@dataclass(frozen=True)
class World:
    """Handwritten digits and what a small VAE made of them."""

    shards: Path
    model: Path
    export: Path
    labels: dict[str, int]  # by key


def make_world(root: Path) -> World:
    """Write the shards, train for some seconds, export."""
    labels = write_shards(root / "shards")
    settings = {
        "run_dir": root / "run",
        "data.path": root / "shards",
        "data.decode": "{kind: image, size: 32, channels: 1}",
        "model.backbone": "{kind: mlp, hidden: [128]}",
        "model.bottleneck": f"{{kind: gaussian, size: {LATENT_SIZE}}}",
        "optimizer.learning_rate.warmup_samples": 0,
        "ema_decay": 0.9,
        "num_steps": 400,
        "monitor.wandb.mode": "disabled",
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    assert train([str(ROOT / "configs/train/vae.yaml"), *overrides]) == 0
    export_model(root / "run", root / "model")
    assert run_export(make_config(root / "run", root / "export", formats=FORMATS)) == 0
    return World(root / "shards", root / "model", root / "export", labels)


def write_shards(folder: Path) -> dict[str, int]:
    """Write digits of 32 px with label and JSON, and return the labels by key."""
    folder.mkdir()
    digits, labels = load_digits(), {}
    for start in range(0, NUM_DIGITS, SHARD_DIGITS):
        with TarWriter(str(folder / f"digits-{start:04d}.tar"), mtime=0) as tar:
            for number in range(start, start + SHARD_DIGITS):
                pixels = (digits.images[number] * (255 / 16)).astype(np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).resize((32, 32)).save(file, "PNG")
                key, label = f"{number:04d}", int(digits.target[number])
                png = b"no picture" if key == BROKEN else file.getvalue()
                notes = {"slant": slant_of(digits.images[number]), "writer": "unknown"}
                members = {"png": png, "cls": str(label), "json": json.dumps(notes)}
                tar.write({"__key__": key, **members})
                labels[key] = label
    build_index(folder)
    return labels


def slant_of(pixels: NDArray[np.float64]) -> float:
    """The covariance of row and column of a digit's ink, in px^2."""
    ink, axis = pixels / pixels.sum(), np.arange(8)
    return float(axis @ ink @ axis - (ink.sum(1) @ axis) * (ink.sum(0) @ axis))


def run_example(name: str, *arguments: object, cwd: Path) -> str:
    """Run examples/<name>.py in a process of its own; return what it printed, no warning among it.

    The Hugging Face libraries keep their cache in `cwd`, and ask nothing of the network.
    """
    quiet = {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"}
    quiet |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    argv = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(
        argv, cwd=cwd, env=os.environ | CPU_ENV | quiet, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout
