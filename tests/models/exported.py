"""Runs without a training, and the models that are exported from them as programs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints.folder import RunState, save_checkpoint
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.distributed.strategies.base import FullState
from pipeline.export.model import export_model
from pipeline.models.autoencoder import build_autoencoder

TOLERANCE = 1e-4  # of the promise, absolute and relative

BURGESS, MLP = {"kind": "burgess"}, {"kind": "mlp", "hidden": [7]}
POINT, GAUSSIAN = {"kind": "deterministic", "size": 3}, {"kind": "gaussian", "size": 2}
BERNOULLI, SQUARED = {"kind": "bernoulli"}, {"kind": "squared_error"}
FLOATS = {"kind": "array", "shape": [2, 3], "range": [-1, 3]}
HALVES = {"kind": "array", "shape": [5], "dtype": "float16", "range": [0, 1]}
COLOUR = {"kind": "image", "size": 32}
RESNET = {"kind": "resnet", "widths": [4, 8], "groups": 4, "blocks": 1}
CLAMPED = {**GAUSSIAN, "logvar": "clamp"}
DEEP = {"kind": "image", "size": [6, 10], "channels": 4, "dtype": "uint16"}
# Every backbone with every bottleneck, images and arrays, and some of the other settings.
CASES: dict[str, tuple[Any, ...]] = {
    "colour": (COLOUR, BURGESS, GAUSSIAN, BERNOULLI, "fp32"),
    "uint16": (DEEP, MLP, POINT, BERNOULLI, "bf16"),
    "float16": (HALVES, MLP, GAUSSIAN, {"kind": "gaussian"}, "fp64"),
    "float32": (FLOATS, MLP, POINT, SQUARED, "fp32"),
    "locatello": ({**COLOUR, "size": 64}, {"kind": "locatello"}, GAUSSIAN, BERNOULLI, "fp32"),
    "tiny": ({**COLOUR, "size": 16}, {"kind": "tiny"}, POINT, SQUARED, "fp32"),
    "resnet": ({**COLOUR, "size": 8}, RESNET, CLAMPED, SQUARED, "fp32"),
    "maps": ({**FLOATS, "shape": [2, 12, 8]}, RESNET, GAUSSIAN, SQUARED, "fp32"),
}
# Those that take other sizes: what divides them, and where the height stands in a batch.
FREE = {"tiny": (8, 1), "resnet": (2, 1), "maps": (2, 2)}
SLOW = sorted(set(CASES) - {"colour", "float32", "maps"})


def leave_run(run_dir: Path, case: tuple[Any, ...], *, scale: float = 1.0, seed: int = 0) -> Path:
    """Leave a run directory as training does; the weights are the initial ones times `scale`."""
    decode, backbone, bottleneck, likelihood, precision = case
    config = TrainConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"path": "nowhere", "decode": decode},
            "model": {"backbone": backbone, "bottleneck": bottleneck, "likelihood": likelihood},
            "objective": {"regularisers": []},
            "precision": precision,
            "ema_decay": None,
        }
    )
    dtype = torch.float64 if precision == "fp64" else torch.float32
    shape = config.data.decode.event_shape
    module = build_autoencoder(config.model, shape, seed=seed, dtype=dtype)
    weights = {name: scale * value.detach() for name, value in module.state_dict().items()}
    tensors = FullState(model=weights, ema=None, exp_avg={}, exp_avg_sq={}, num_updates=1)
    state = RunState(1, 1, 1, "order", "data", 1, {})
    save_checkpoint(run_dir / "checkpoints", state, tensors)
    (run_dir / "config.yaml").write_text(strict.dump(config))
    return run_dir


def export(run: Path, out: Path, **options: Any) -> Path:
    export_model(run, out, weights="raw", **options)
    return out


def stored_values(decode: Mapping[str, Any], shape: tuple[int, ...], count: int) -> np.ndarray:
    low, high = decode.get("range", (0, 255))
    values = np.random.default_rng(7).uniform(low, high, (count, *shape))
    values[0], values[-1] = low, high
    return values.astype(decode.get("dtype", "float32" if "shape" in decode else "uint8"))


def assert_close(found: np.ndarray, wanted: torch.Tensor) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)
