"""`latentmill export-model RUN OUT`: a checkpoint's model alone, to be loaded without the run.

checkpoint -> LoadedRun (weights, config) + RunState (where it stood) -> OUT: see `interchange`
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.data.decode import ArrayDecode, Decode
from pipeline.models.autoencoder import num_parameters
from pipeline.models.interchange import Description, StoredValues, check_absent, save_pretrained
from pipeline.rundir import Step, load_run

UINT8_RANGE = (0.0, 255.0)  # of images


@dataclass(frozen=True)
class ModelReport:
    """What was exported."""

    out: Path
    step: int
    weights: str
    weights_sha256: str
    num_parameters: int
    event_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]


def export_model(
    run_dir: Path,
    out: Path,
    *,
    step: Step | None = None,
    weights: Literal["raw", "ema"] = "ema",
) -> ModelReport:
    """Export the model of `step`, or of the newest checkpoint that verifies, to the new folder.

    Raises UserError if there is no such run, checkpoint or average, or if `out` exists.
    """
    check_absent(out)
    run = load_run(run_dir, step=step, weights=weights)
    state = run.state
    decode = run.config.data.decode
    description = Description(
        # How the training saved memory is no property of the network.
        model=run.config.model.model_copy(update={"gradient_checkpointing": False}),
        event_shape=decode.event_shape,
        latent_shape=run.model.latent_shape,
        stored=_stored_values(decode),
        decode=decode.model_dump(mode="json"),
        precision=run.config.precision,
        weights=weights,
        weights_sha256=run.weights_sha256,
        step=state.step,
        samples_seen=state.position,
        dataset_id=state.dataset_id,
        order_id=state.order_id,
        versions=state.versions,
    )
    save_pretrained(out, description, run.model.state_dict())
    return ModelReport(
        out=out,
        step=state.step,
        weights=weights,
        weights_sha256=run.weights_sha256,
        num_parameters=num_parameters(run.model),
        event_shape=description.event_shape,
        latent_shape=description.latent_shape,
    )


def _stored_values(decode: Decode) -> StoredValues:
    scale = decode.range if isinstance(decode, ArrayDecode) else UINT8_RANGE
    return StoredValues.model_validate({"dtype": decode.stored_dtype.name, "range": scale})
