"""`latentmill export-model RUN OUT`: writes a checkpoint's model, to be loaded without the run.

checkpoint -> LoadedRun (weights, config) + RunState (step, data) -> OUT: `models.interchange`
           -> on request, encoder and decoder as separate files: `models.portable`
           -> or a folder that diffusers opens: `models.interchange.writing`
latent_stats.json of a finished export -> on request, scaling factors in OUT/config.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.common.console import listing
from pipeline.common.errors import UserError
from pipeline.data.decode import ArrayDecode, Decode
from pipeline.export.patches import patch_statistics
from pipeline.export.statistics import scaling
from pipeline.latents import LatentDataset
from pipeline.models.autoencoder import num_parameters
from pipeline.models.interchange import (
    CONFIG,
    WEIGHTS,
    Description,
    Network,
    StoredValues,
    check_absent,
    save_pretrained,
)
from pipeline.models.interchange.weights import DIFFUSERS_WEIGHTS
from pipeline.models.interchange.writing import (
    PatchStatistics,
    is_flux2,
    notes_on,
    save_diffusers,
    writable,
)
from pipeline.models.portable import check_packages, export_networks
from pipeline.training.loading import LoadedRun, Step, load_run

Format = Literal["latentmill", "diffusers"]


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
    files: tuple[str, ...]  # below `out`
    notes: tuple[str, ...] = ()  # what differs, or is not known, in the format of others

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        weights = {"ema": "averaged weights (ema)", "raw": "weights as trained (raw)"}[self.weights]
        return [
            f"OK  step {self.step:,}, {weights}, {self.num_parameters:,} parameters",
            *listing(
                {
                    "folder": str(self.out),
                    "files": ", ".join(self.files),
                    "takes": f"[B, {', '.join(map(str, self.event_shape))}] in [0, 1]",
                    "gives latents": f"[B, {', '.join(map(str, self.latent_shape))}]",
                    "sha256 of the weights": self.weights_sha256,
                    "notes": list(self.notes),
                }
            ),
        ]


def export_model(
    run_dir: Path,
    out: Path,
    *,
    step: Step | None = None,
    weights: Literal["raw", "ema"] = "ema",
    onnx: bool = False,
    torch_export: bool = False,
    latents: str | None = None,
    format: Format = "latentmill",  # noqa: A002 - what users call it
) -> ModelReport:
    """Export the model of `step`, or of the newest checkpoint that verifies, to a new folder.

    onnx, torch_export: write encoder and decoder in these formats as well. latents: directory or
    URL of a finished export by this model, whose scaling factors are stored. format: the project's
    own folder, or one that diffusers opens. Raises UserError if there is no such run, checkpoint,
    average or export, if `out` exists, or if a format cannot be written.
    """
    check_absent(out)
    if onnx:
        check_packages()
    if format == "diffusers" and (onnx or torch_export):
        raise UserError(
            "--onnx and --torch-export belong to a folder of latentmill: leave out --format "
            "diffusers, or export twice."
        )
    run = load_run(run_dir, step=step, weights=weights)
    if format == "diffusers":
        files, notes = _save_for_diffusers(run, out, latents)
    else:
        files, notes = _save_own(run, out, latents, weights, onnx, torch_export), ()
    return ModelReport(
        out=out,
        step=run.step,
        weights=weights,
        weights_sha256=run.weights_sha256,
        num_parameters=num_parameters(run.model),
        event_shape=run.model.event_shape,
        latent_shape=run.model.latent_shape,
        files=files,
        notes=notes,
    )


def _save_own(
    run: LoadedRun,
    out: Path,
    latents: str | None,
    weights: Literal["raw", "ema"],
    onnx: bool,
    torch_export: bool,
) -> tuple[str, ...]:
    """Write the project's own folder, and return its files."""
    state = run.state
    decode = run.config.data.decode
    scaling, _ = _read_latents(latents, run, with_patches=False)
    stored = _stored_values(decode)
    networks, files = _networks(run, stored, onnx, torch_export)
    description = Description(
        # Not a property of the network: it saves memory in training.
        model=run.config.model.model_copy(update={"gradient_checkpointing": False}),
        event_shape=decode.event_shape,
        latent_shape=run.model.latent_shape,
        stored=stored,
        decode=decode.model_dump(mode="json"),
        precision=run.config.precision,
        weights=weights,
        weights_sha256=run.weights_sha256,
        encoder_sha256=run.encoder_sha256,
        step=state.step,
        samples_seen=state.position,
        dataset_id=state.dataset_id,
        order_id=state.order_id,
        versions=state.versions,
        networks=networks,
        **scaling,
    )
    save_pretrained(out, description, run.model.state_dict(), files)
    return (CONFIG, WEIGHTS, *files)


def _save_for_diffusers(
    run: LoadedRun, out: Path, latents: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write a folder that diffusers opens, and return its files and the notes on it."""
    writable(run.model.config)  # before the latents are read
    scaling, patches = _read_latents(latents, run, with_patches=is_flux2(run.model.config))
    save_diffusers(out, run.model, scaling=scaling, patches=patches)
    return (CONFIG, DIFFUSERS_WEIGHTS), notes_on(run.model.config, is_scaled=bool(scaling))


def _networks(
    run: LoadedRun, stored: StoredValues, onnx: bool, torch_export: bool
) -> tuple[dict[str, Network] | None, dict[str, bytes]]:
    """Return encoder and decoder in these formats: their descriptions and files."""
    if not (onnx or torch_export):
        return None, {}
    decode = run.config.data.decode
    return export_networks(
        run.model,
        lambda x: decode.to_unit(decode.event_view(x)),
        stored,
        tuple(decode.buffer_shape),
        onnx=onnx,
        torch_export=torch_export,
        height_axis=2 if isinstance(decode, ArrayDecode) else 1,  # arrays have channels first
    )


def _stored_values(decode: Decode) -> StoredValues:
    stored = decode.stored_dtype
    scale = decode.range if isinstance(decode, ArrayDecode) else (0, np.iinfo(stored).max)
    return StoredValues.model_validate({"dtype": stored.name, "range": scale})


def _read_latents(
    latents: str | None, run: LoadedRun, *, with_patches: bool
) -> tuple[dict[str, Any], PatchStatistics | None]:
    """Return the scaling of a finished export by this encoder, and the statistics of its patches.

    Raises UserError if there is no such export.
    """
    if latents is None:
        return {}, None
    with LatentDataset(latents) as dataset:
        manifest = dataset.manifest
        if not (manifest.is_of(run.weights_sha256) or manifest.is_of(run.encoder_sha256)):
            raise UserError(
                f"{latents} holds latents of another model: its weights_sha256 is "
                f"{manifest.model_sha256}, that of the weights to be exported is "
                f"{run.weights_sha256}. Give the --step and --weights that encoded them, or export "
                "the latents again."
            )
        statistics = dataset.statistics
        if statistics["num_rows"] == 0:
            raise UserError(
                f"{latents} holds no valid row, so it has no scaling: leave out --latents."
            )
        patches = patch_statistics(dataset) if with_patches else None
    return scaling(statistics), patches
