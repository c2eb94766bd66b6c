"""What the tests of foreign models share: a model, and its weights by other names."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.models.autoencoder import AutoEncoder, ModelConfig, build_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
MINI = {"kind": "resnet", "preset": "resnet-mini"}


def make_model(
    backbone: Mapping[str, Any],
    *,
    size: int | None = None,
    kind: str = "gaussian",
    likelihood: str = "squared_error",
) -> AutoEncoder:
    """A model in which no parameter equals another, or its initial value."""
    bottleneck: dict[str, Any] = {"kind": kind}
    bottleneck |= {"logvar": "clamp"} if kind == "gaussian" else {}
    bottleneck |= {} if size is None else {"size": size}
    config = ModelConfig.model_validate(
        {
            "backbone": backbone,
            "bottleneck": bottleneck,
            "likelihood": {"kind": likelihood},
        }
    )
    model = build_autoencoder(config, (3, 32, 32), seed=1, dtype=torch.float32)
    generator = torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def as_old(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' weights by the names that it wrote before 2023."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"\.(to_q|to_k|to_v|to_out\.0)\.", lambda found: f".{old[found[1]]}.", name): value
        for name, value in tensors.items()
    }


def as_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' weights as latent diffusion and FLUX name and shape them."""
    num_levels = len({name.split(".")[2] for name in tensors if ".up_blocks." in name})
    matrices = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if found := re.search(r"attentions\.\d+\.(to_q|to_k|to_v|to_out\.0|group_norm)\.", name):
            name = name.replace(f".{found[1]}.", f".{matrices[found[1]]}.")
            value = value[:, :, None, None].contiguous() if value.ndim == 2 else value
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = name.replace("mid_block.resnets.0", "mid.block_1")
        name = name.replace("mid_block.resnets.1", "mid.block_2")
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{num_levels - 1 - int(m[1])}", name)
        for new, old in (
            ("resnets", "block"),
            ("attentions", "attn"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
        ):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    return renamed
