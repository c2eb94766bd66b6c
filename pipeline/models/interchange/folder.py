"""A trained model as a folder, without its run.

`latentmill export-model RUN OUT` writes the folder, and this loads it:

    from pipeline.models.interchange import from_pretrained
    model = from_pretrained("OUT")
    z = model(x, mode="encode").posterior.mu  # x [B, *event] in [0, 1]

    OUT/config.json         everything besides the weights: see `Description`
    OUT/model.safetensors   parameters and buffers by name
    OUT/encoder.onnx ...    on request, see `portable`: not read here

The files depend on the checkpoint only (and on the latents' statistics, on request): exporting
again gives the same bytes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.common import strict
from pipeline.common.component import Component
from pipeline.common.errors import UserError
from pipeline.common.files import (
    local_directory,
    publish,
    sync_file,
    temporary_name,
    write_atomic,
    write_json,
)
from pipeline.common.precision import Precision, parameter_dtype
from pipeline.models.autoencoder import AutoEncoder, ModelConfig, build_autoencoder, tensors_sha256

FORMAT = "latentmill-model-1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"

Shape = tuple[PositiveInt, ...]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class StoredValues(Component):
    """The values as the data holds them; the model takes (value - low) / (high - low)."""

    dtype: Literal["uint8", "uint16", "float16", "float32"]
    range: tuple[float, float]  # (low, high)


class TensorInfo(Component):
    """An input or output of a network; the shape is that of one sample, the batch comes first."""

    name: str
    dtype: Literal["uint8", "uint16", "float16", "float32"]
    shape: Shape


class Network(Component):
    """The encoder or the decoder as files, one per format; see `portable`."""

    files: dict[str, Sha256]
    # The encoder's x are values as stored (images [height, width, channels]), which it scales
    # to [0, 1].
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class Description(Component):
    """The content of config.json: all that a user of the model needs besides the weights.

    None is left out of the file, so optional fields do not change the files of other models.
    """

    format: Literal["latentmill-model-1"] = FORMAT
    model: ModelConfig
    event_shape: Shape  # of one sample x; an image is (channels, height, width)
    latent_shape: Shape
    stored: StoredValues
    decode: dict[str, Any]  # the settings that decoded files to stored values
    precision: Precision  # of the training; bf16 means parameters in fp32 under autocast
    weights: Literal["raw", "ema"]  # as trained, or their moving average
    weights_sha256: Sha256  # see `tensors_sha256`
    encoder_sha256: Sha256 | None = None  # see `autoencoder.encoder_sha256`; None in older models
    step: int = Field(ge=0)  # global batches that the weights have seen,
    samples_seen: int = Field(ge=0)  # and samples
    dataset_id: str | None = None  # None in models that were imported
    order_id: str | None = None
    versions: dict[str, str]  # of the libraries that trained
    networks: dict[str, Network] | None = None  # encoder, decoder
    # Of exported latents, under the names that diffusers uses: a latent is normalised per channel
    # by latents_mean and latents_std, or as (z - shift_factor) * scaling_factor.
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None


def check_absent(out: Path) -> None:
    """Raise UserError if `out` exists, or is no place for a folder."""
    if out.exists() or out.is_symlink():
        raise UserError(
            f"{out} exists already: name another folder for the model, or remove this one."
        )
    local_directory(out, "The model's folder")


def save_pretrained(
    out: Path,
    description: Description,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the folder `out` atomically; `files`: further files, by name.

    Raises UserError if `out` exists or cannot be written.
    """
    content = description.model_dump(mode="json")
    kept = {name: value for name, value in content.items() if value is not None}
    write_folder(out, kept, tensors, WEIGHTS, files)


def write_folder(
    out: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weights: str,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write `content` as config.json, the tensors under the name `weights`, and further files.

    Raises UserError if `out` exists or cannot be written.
    """
    check_absent(out)
    staged = temporary_name(out)
    try:
        staged.mkdir(parents=True)
        write_json(staged / CONFIG, content)
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        # The metadata that the loaders of other libraries require.
        save_file(contiguous, staged / weights, metadata={"format": "pt"})
        # safetensors makes the file private; use the permissions of the other file.
        shutil.copymode(staged / CONFIG, staged / weights)
        sync_file(staged / weights)
        for name, data in (files or {}).items():
            write_atomic(staged / name, data)
        publish(staged, out)
    except (OSError, SafetensorError) as error:  # SafetensorError also reports a full disk
        raise UserError(f"the model cannot be written to {out}: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def read_description(path: str | Path) -> Description:
    """Read config.json of an exported model; raises UserError if it is missing or unusable."""
    file = local_directory(path, "The model") / CONFIG
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = json.loads(text)
    except FileNotFoundError:
        raise UserError(
            f"{path} is no exported model: it has no {CONFIG}. `latentmill export-model RUN {path}`"
            " makes one from a run."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Export the model again.") from error
    if isinstance(content, dict) and "_class_name" in content:
        raise UserError(
            f"{path} is a folder of diffusers: `latentmill import-model {path} OUT` makes a folder "
            "of latentmill from it."
        )
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{file} says format {found!r}; this version of latentmill reads {FORMAT!r} only. "
            "Load it with the version that wrote it, or export the model again."
        )
    return strict.load(Description, file, [], text=text)


def read_tensors(path: str | Path, description: Description) -> dict[str, Tensor]:
    """Read the weights of an exported model; raises UserError unless they are those described."""
    file = Path(path) / WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged: {error}. Export it again.") from error
    digest = tensors_sha256(tensors)
    if digest != description.weights_sha256:
        raise UserError(
            f"{file} is damaged, or not the one that {CONFIG} describes: its weights have the "
            f"sha256 {digest}, {CONFIG} says {description.weights_sha256}. Export the model again."
        )
    return tensors


def from_pretrained(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> AutoEncoder:
    """Load an exported model in evaluation mode, by default on the CPU in its own precision.

    Raises UserError if a file is missing, damaged, of an unknown format, or does not fit the other.
    """
    description = read_description(path)
    tensors = read_tensors(path, description)
    try:
        model = build_autoencoder(
            description.model,
            description.event_shape,
            seed=0,  # every weight is replaced
            dtype=parameter_dtype(description.precision),
        )
        model.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{Path(path) / WEIGHTS} does not hold the weights of the model in {CONFIG}: {error}"
        ) from error
    return model.to(device=device, dtype=dtype).eval()
