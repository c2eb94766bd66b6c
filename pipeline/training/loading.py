"""Loads the model of a run, without the optimizer: for evaluation and exports.

run directory -> config -> checkpoint: chosen, its weights verified -> model
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from pipeline.checkpoints.folder import (
    WEIGHT_FILES,
    RunState,
    Weights,
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_weights,
)
from pipeline.checkpoints.retention import best_checkpoint
from pipeline.common.errors import UserError
from pipeline.common.files import local_directory
from pipeline.common.precision import parameter_dtype
from pipeline.config import TrainConfig, read_config
from pipeline.losses.players import player_of
from pipeline.models.autoencoder import (
    AutoEncoder,
    build_autoencoder,
    encoder_sha256,
    tensors_sha256,
)
from pipeline.monitoring.monitor import read_records

Step = int | Literal["best"]  # names a checkpoint: by its step, or the best by its evaluation


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and the run that it comes from."""

    model: AutoEncoder  # evaluation mode, on the CPU
    config: TrainConfig
    state: RunState
    weights_sha256: str  # see `tensors_sha256`

    @property
    def encoder_sha256(self) -> str:
        """Digest of the encoder, see `autoencoder.encoder_sha256`."""
        return encoder_sha256(self.model)

    @property
    def step(self) -> int:
        """Number of global batches that the model was trained on."""
        return self.state.step


def load_config(run_dir: Path) -> TrainConfig:
    """Read the config of a run, with the `run_dir` it lies in now; UserError if there is none."""
    local_directory(run_dir, "The run directory")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    here = f"run_dir={json.dumps(str(run_dir))}"
    return read_config(run_dir / "config.yaml", [here], version=1)


def choose_checkpoint(
    run_dir: Path, config: TrainConfig, step: Step | None, weights: Weights
) -> Path:
    """Return the checkpoint of `step`, the best one, or (None) the newest whose weights verify.

    Raises UserError if there is no such checkpoint.
    """
    directory, by = run_dir / "checkpoints", config.checkpoint.keep.best
    if step == "best":
        if by is None:
            raise UserError(
                f"{run_dir} has no best checkpoint: set checkpoint.keep.best in the training "
                "config, or give a step."
            )
        values = by.values(read_records(run_dir / "metrics.jsonl"))
        best = best_checkpoint(list_checkpoints(directory), by, values)
        if best is None:
            raise UserError(f"{run_dir} has no checkpoint yet whose {by.metric} was evaluated.")
        step = int(best.name.removeprefix("step-"))
    return find_checkpoint(directory, step, WEIGHT_FILES[weights])


def load_run(
    run_dir: Path,
    *,
    step: Step | None = None,
    weights: Weights = "ema",
    config: TrainConfig | None = None,
) -> LoadedRun:
    """Load the model of the checkpoint that `choose_checkpoint` names; the optimizer is not read.

    weights: "ema" for averaged weights. config: the run's, if it was read already. Raises UserError
    if there is no such checkpoint, if the run kept no average, or if the config describes another
    model.
    """
    config = config or load_config(run_dir)
    path = choose_checkpoint(run_dir, config, step, weights)
    tensors = read_weights(path, weights)
    state = {name: t for name, t in tensors.items() if player_of(name) == "autoencoder"}
    dtype = parameter_dtype(config.precision)
    shape = config.data.decode.event_shape
    model = build_autoencoder(config.model, shape, seed=config.seed, dtype=dtype)
    what = f"{path} holds weights of another model than {run_dir}/config.yaml"
    check_shapes(model.state_dict(), state, what)
    model.load_state_dict(state)
    model.eval()
    return LoadedRun(model, config, read_state(path), tensors_sha256(state))


def check_shapes(model: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError, which begins with `what`, unless names and shapes are the model's."""
    expected = {name: list(tensor.shape) for name, tensor in model.items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    differing = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if differing:
        first = differing[0]
        raise UserError(
            f"{what} describes: {len(differing)} tensors differ, the first is {first}: "
            f"{found.get(first, 'none')} there, {expected.get(first, 'none')} by the config. Give "
            "the config back the settings of `model` and `data.decode` that the run was trained "
            "with."
        )
