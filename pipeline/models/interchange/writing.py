"""A model as a folder that diffusers opens: `from_pretrained(FOLDER)` of its class.

    OUT/config.json                               see `diffusers`
    OUT/diffusion_pytorch_model.safetensors       the networks, by diffusers' names; see `names`

FLUX.2's class also holds the mean and variance of latents by channel and place in a patch of 2 x 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.models.autoencoder import AutoEncoder, ModelConfig
from pipeline.models.backbones.resnet import Resnet
from pipeline.models.backbones.tiny import Tiny
from pipeline.models.interchange.diffusers import (
    ATTENTION,
    CLASSES,
    PATCH,
    PIXEL_RANGE,
    SCALING,
    VERSION,
)
from pipeline.models.interchange.folder import write_folder
from pipeline.models.interchange.names import to_diffusers
from pipeline.models.interchange.weights import DIFFUSERS_WEIGHTS


@dataclass(frozen=True)
class PatchStatistics:
    """Mean and variance [4 Z] of latents: by channel, then by place in a patch of 2 x 2."""

    mean: Tensor
    variance: Tensor


def save_diffusers(
    out: Path,
    model: AutoEncoder,
    *,
    scaling: Mapping[str, Any],
    patches: PatchStatistics | None = None,
) -> None:
    """Write the folder `out` atomically.

    scaling: of an export's latents, empty = unknown. patches: for FLUX.2's class; None = unknown.
    Raises UserError if diffusers has no class for the model, or if `out` exists or cannot be
    written.
    """
    content = to_config(model.config, model.event_shape, scaling)
    tensors = to_diffusers(model.state_dict())
    if is_flux2(model.config):
        size = PATCH**2 * model.config.bottleneck.size
        patches = patches or PatchStatistics(torch.zeros(size), torch.ones(size))
        tensors["bn.running_mean"] = patches.mean.float()
        tensors["bn.running_var"] = patches.variance.float()
        tensors["bn.num_batches_tracked"] = torch.tensor(1)
    write_folder(out, content, tensors, DIFFUSERS_WEIGHTS)


def to_config(
    model: ModelConfig, event_shape: tuple[int, ...], scaling: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json for a model of pictures [C, H, W], with `_class_name`.

    scaling: of an export's latents, empty = unknown. Its lists by channel are left out: pipelines
    that know them multiply by scaling_factor as well. Raises UserError if diffusers has no class
    for the model.
    """
    backbone = writable(model)
    channels, height, width = event_shape
    settings: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": model.bottleneck.size,
        "sample_size": height if height == width else [height, width],
        "scaling_factor": scaling.get("scaling_factor") or 1.0,
        "shift_factor": scaling.get("shift_factor"),
    }
    name, without = "AutoencoderKL", set[str]()  # settings that the class does not have
    if isinstance(backbone, Tiny):
        name, without = "AutoencoderTiny", {"sample_size", "block_out_channels"}
        settings["shift_factor"] = settings["shift_factor"] or 0.0
    else:
        settings |= _of_resnet(backbone)
        if is_flux2(model):
            name, without = "AutoencoderKLFlux2", {"force_upcast", *SCALING}
            settings["decoder_block_out_channels"] = backbone.decoder_widths
    content = CLASSES[name].model_validate(settings).model_dump(mode="json", exclude=without)
    return {"_class_name": name, "_diffusers_version": VERSION, **dict(sorted(content.items()))}


def _of_resnet(backbone: Resnet) -> dict[str, Any]:
    attention, levels = backbone.attention, range(len(backbone.widths))
    decoder_levels = attention.decoder_levels
    decoder_levels = attention.levels if decoder_levels is None else decoder_levels
    return {
        "block_out_channels": backbone.widths,
        "down_block_types": [
            f"{ATTENTION * (level in attention.levels)}DownEncoderBlock2D" for level in levels
        ],
        "up_block_types": [
            f"{ATTENTION * (level in decoder_levels)}UpDecoderBlock2D" for level in levels[::-1]
        ],
        "layers_per_block": backbone.blocks,
        "mid_block_add_attention": attention.mid,
        "norm_num_groups": backbone.groups,
        "use_quant_conv": backbone.quant_convs,
        "use_post_quant_conv": backbone.quant_convs,
    }


def notes_on(model: ModelConfig, *, is_scaled: bool) -> tuple[str, ...]:
    """Return what a person must know about a written folder, a line each.

    is_scaled: whether the scaling of an export was at hand.
    """
    notes: list[str] = []
    if not is_scaled and is_flux2(model):
        notes.append("the latents' mean and variance are unknown: bn has 0 and 1 (see --latents)")
    elif not is_scaled:
        notes.append("scaling_factor is unknown: 1.0 stands there (see --latents)")
    if getattr(model.bottleneck, "logvar", None) == "tanh":
        notes.append("means are equal; large log-variances differ: diffusers clamps, not tanh")
    return tuple(notes)


def is_flux2(model: ModelConfig) -> bool:
    """Whether diffusers' class for the model is AutoencoderKLFlux2: by the preset's name."""
    return isinstance(model.backbone, Resnet) and model.backbone.preset == "flux2"


def writable(model: ModelConfig) -> Resnet | Tiny:
    """Return the backbone of a model that diffusers has a class for; else raise UserError."""
    backbone = model.backbone
    if isinstance(backbone, Resnet | Tiny):
        reason = _refusal(model, backbone)
    else:
        reason = f"it has classes for the backbones resnet and tiny, not for {backbone.kind}"
    if isinstance(backbone, Resnet | Tiny) and not reason:
        return backbone
    raise UserError(f"diffusers cannot hold this model: {reason}. Leave out --format.")


def _refusal(model: ModelConfig, backbone: Resnet | Tiny) -> str:
    """Return why diffusers' class for the backbone cannot hold the model; empty if it can."""
    wanted = "gaussian" if isinstance(backbone, Resnet) else "deterministic"
    if model.bottleneck.kind != wanted:
        return (
            f"its class for backbone {backbone.kind} has what bottleneck {wanted} has, and the "
            f"model's is {model.bottleneck.kind}"
        )
    if getattr(model.likelihood, "link", None) != "identity":
        return (
            "its decoders give pictures, but this model's output goes through a sigmoid first "
            f"(model.likelihood {model.likelihood.kind} without link identity)"
        )
    if isinstance(backbone, Tiny):
        return ""
    if backbone.pixel_range != PIXEL_RANGE:
        return (
            f"its pipelines have pictures in {list(PIXEL_RANGE)}, but model.backbone.pixel_range "
            f"is {list(backbone.pixel_range)}"
        )
    if backbone.decoder_widths not in (None, backbone.widths) and not is_flux2(model):
        return (
            "only its AutoencoderKLFlux2 has decoder widths of its own, and that is the class of "
            f"preset flux2: model.backbone.preset is {backbone.preset}"
        )
    return ""
