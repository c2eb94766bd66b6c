"""Changes of DeepSpeed's engine that make it compute what `ddp` computes.

tests/distributed/ tests the facts about DeepSpeed's internals on which this file relies.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.distributed.optimizer import AdamWConfig
from pipeline.losses.players import Player


def check_norms_in_float32(optimizer: Any) -> None:
    """Make stage 3 skip a step if the square of the norm overflows float32, as `ddp` does.

    Stages 1 and 2 do so; stage 3 sums the squares in float64. It would apply a gradient whose
    squares, Adam's second moments, are infinite in float32: that parameter would never change
    again.
    """
    original = optimizer._get_norm_groups

    def norm_groups() -> list[Tensor]:
        norms: list[Tensor] = original()  # of each group of parameters; -1: not finite
        return [n.where(n.float().square().isfinite(), torch.inf) for n in norms]

    optimizer._get_norm_groups = norm_groups


def group_norms(optimizer: Any) -> list[Tensor]:
    """Return a list to which each step appends the gradient norm of every group of parameters.

    DeepSpeed itself keeps the total norm only. The groups are in the order of `group_players`.
    """
    original = optimizer.get_grad_norm_direct
    found: list[Tensor] = []

    def norm_direct(*arguments: Any) -> Tensor:
        found.append(original(*arguments))
        return found[-1]

    optimizer.get_grad_norm_direct = norm_direct
    return found


def group_players(optimizer: Any) -> list[Player]:
    """Return the player of each parameter group; stage 3 splits groups into smaller ones."""
    groups = optimizer.param_groups
    of = getattr(optimizer, "sub_group_to_group_id", None)
    return [groups[of[i]]["player"] for i in sorted(of)] if of else [g["player"] for g in groups]


def fill_in_config(
    config: dict[str, Any],
    optimizer: AdamWConfig,
    accelerator: Accelerator,
    micro_batch: int,
    precision: str,
) -> None:
    """Fill DeepSpeed's config with the settings that follow from the run's config."""
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["train_batch_size"] = (
        micro_batch * accelerator.gradient_accumulation_steps * accelerator.num_processes
    )
    config["gradient_clipping"] = optimizer.max_grad_norm or 0.0
    config.pop("torch_autocast", None)  # of a former run in this process
    if precision == "bf16":
        # Autocast with fp32 weights, as under DDP; gradients are exchanged in fp32 as well.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
