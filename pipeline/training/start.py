"""How a training starts: from its newest checkpoint, or first from the weights of `init_from`.

init_from: run directory or model's folder -> weights by name, checked -> main process
-> all processes -> checkpoint of step 0, so that no later start reads init_from again
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints.folder import Weights, list_checkpoints, read_state
from pipeline.checkpoints.folder import read_weights as read_checkpoint
from pipeline.checkpoints.manager import Checkpoints
from pipeline.common import strict
from pipeline.common.component import Component
from pipeline.common.console import plural, progress, warn
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.order.mixture import Mixture
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import FullState, Named, Strategy
from pipeline.losses.players import player_of
from pipeline.models.autoencoder import AutoEncoder, ModelConfig, tensors_sha256
from pipeline.models.interchange import CONFIG, Description, read_description, read_weights
from pipeline.models.interchange.diffusers import read_config as read_foreign_config
from pipeline.models.interchange.weights import autoencoder_folder, fitting
from pipeline.training.build import build_without_memory
from pipeline.training.loading import choose_checkpoint, load_config
from pipeline.training.locations import read_locations

# Of a model, and of what decodes its pictures; None where that is not known.
Settings = tuple[ModelConfig, dict[str, Any] | None]
IN_WORDS: dict[Weights, str] = {"ema": "averaged weights", "raw": "weights as trained"}


@dataclass(frozen=True)
class InitialWeights:
    """What `init_from` holds."""

    weights: Named  # of the autoencoder; without those of a likelihood that has other parameters
    origin: dict[str, str]  # see `RunState.init_from`
    line: str  # for a person


def initial_weights(config: TrainConfig, order: Mixture) -> InitialWeights | None:
    """Read `init_from`, if this is the first start; for one process.

    order: of the samples of this run.

    Returns None if there is a checkpoint to go on from, or no `init_from`. Raises UserError if the
    weights are not there, or do not fit the model.
    """
    if config.init_from is None or list_checkpoints(Path(config.run_dir) / "checkpoints"):
        return None
    model = build_without_memory(config)
    path, differing = Path(config.init_from), ""
    try:
        there = _settings(path)
        differing = "; ".join(_differences(there, config)) if there else ""
        found, kind, about = _read(path, model)
    except UserError as error:
        hint = f" Settings that differ: {differing}." if differing else ""
        raise UserError(f"init_from: {error}{hint}") from error
    if there and _encoding(there[0]) != _encoding(config.model):
        warn(f"init_from {path} was trained with other settings: {differing}")
    digest = tensors_sha256(found)
    line = f"starts from {path}: {about}, sha256 {digest}"
    if initialised := [name for name in model.state_dict() if name not in found]:
        line += f"; not there, so left as initialised: {', '.join(initialised)}"
    line += _other_data(path, order)
    return InitialWeights(found, {"kind": kind, "sha256": digest}, line)


def start(
    config: TrainConfig,
    initial: InitialWeights | None,
    order: Mixture,
    *,
    strategy: Strategy,
    checkpoints: Checkpoints,
    runtime: Runtime,
) -> int:
    """Restore the newest checkpoint, or load `initial`; return the step. A collective.

    initial: on the main process, see `initial_weights`.
    """
    step = checkpoints.restore()
    if step is not None or config.init_from is None:
        return step or 0
    with runtime.sharing_errors():
        if runtime.is_main and initial is None:  # all checkpoints were damaged
            initial = initial_weights(config, order)
    tensors = strategy.full_state().model
    origin: dict[str, str] | None = None
    if initial is not None:
        for name, value in initial.weights.items():
            tensors[name].copy_(value)
        origin = initial.origin
        progress(initial.line)
    runtime.broadcast_tensors([tensors[name] for name in sorted(tensors)])
    strategy.load_full_state(FullState(tensors, ema=None, exp_avg={}, exp_avg_sq={}))
    checkpoints.init_from = runtime.broadcast(origin)
    checkpoints.save(0)
    return 0


def is_run(path: Path) -> bool:
    """Whether a run directory lies there."""
    return (path / "config.yaml").is_file()


def _read(path: Path, model: AutoEncoder) -> tuple[Named, str, str]:
    """Return the weights that lie there, their kind, and what they are in words."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist: name a run directory, the folder of a model, or a "
            ".safetensors file."
        )
    if is_run(path):
        return _read_run(path, model)
    found = read_weights(path, model)
    if (description := _description(path)) is not None:
        about = f"model of step {description.step:,}, {IN_WORDS[description.weights]}"
        return found, "folder", about
    return (found, "diffusers", "diffusers") if path.is_dir() else (found, "file", "file")


def _read_run(run_dir: Path, model: AutoEncoder) -> tuple[Named, str, str]:
    """Read the newest checkpoint of a run that verifies, averaged if the run kept an average."""
    config = load_config(run_dir)
    weights: Weights = "raw" if config.ema_decay is None else "ema"
    path = choose_checkpoint(run_dir, config, None, weights)
    if not (path / "ema.safetensors").exists():  # of before the average was turned on
        weights = "raw"
    tensors = read_checkpoint(path, weights)
    found = fitting(
        path, {n: t for n, t in tensors.items() if player_of(n) == "autoencoder"}, model
    )
    return found, "run", f"run at step {read_state(path).step:,}, {IN_WORDS[weights]}"


def _other_data(path: Path, order: Mixture) -> str:
    """Say so if a run, or an exported model, was trained on another data set than `order` is of."""
    description, locations = _description(path), read_locations(path) if is_run(path) else None
    there = locations.dataset_id if locations else description and description.dataset_id
    if there in (None, order.dataset_id):
        return ""
    seen = sum(one.samples for one in locations.data_sets) if locations else 0
    counted = f", {plural(seen, 'sample')}" if seen else ""
    return (
        f"; it was trained on another data set ({there}{counted}) than this run "
        f"({order.dataset_id}, {plural(order.num_samples, 'sample')})"
    )


def _description(path: Path) -> Description | None:
    """Return the description of an exported model; None for anything else."""
    try:
        return read_description(path)
    except UserError:
        return None


def _settings(path: Path) -> Settings | None:
    """Return the settings of a run, an exported model or a diffusers folder; else None."""
    if is_run(path):
        config = load_config(path)
        return config.model, config.data.decode.model_dump(mode="json")
    if (description := _description(path)) is not None:
        return description.model, description.decode
    foreign = autoencoder_folder(path) / CONFIG
    return (read_foreign_config(foreign)[0].model(), None) if foreign.is_file() else None


def _differences(there: Settings, config: TrainConfig) -> list[str]:
    """Return the settings that shape a model and differ, with both values."""
    here = (config.model, there[1] and config.data.decode.model_dump(mode="json"))
    trees = [{"model": model, "data": {"decode": decode}} for model, decode in (there, here)]
    return [
        f"{path} is {left!r} there, {right!r} here"
        for path, left, right in strict.difference(*trees)
        if not path.startswith(("model.gradient_checkpointing", "model.likelihood"))
    ]


def _encoding(model: ModelConfig) -> tuple[str, dict[str, Any], Component]:
    """Return the settings on which latents depend, besides weights."""
    return model.backbone.kind, model.backbone.encoder_settings(), model.bottleneck
