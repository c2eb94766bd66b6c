"""What is done to DeepSpeed's engine, so that it computes what `ddp` computes.

Facts about its internals that this file relies on are tested in tests/distributed/.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.distributed.optimizer import AdamWConfig
from pipeline.losses.players import Player


def check_norms_in_float32(optimizer: Any) -> None:
    """Have stage 3 skip a step if the square of the norm leaves float32, as `ddp` does.

    Stages 1 and 2 do so; stage 3 adds the squares up in float64. It would apply a gradient whose
    own squares, Adam's second moments, are infinite in float32: that parameter would never move
    again.
    """
    original = optimizer._get_norm_groups

    def norm_groups() -> list[Tensor]:
        norms: list[Tensor] = original()  # of each group of parameters; -1: not finite
        return [n.where(n.float().square().isfinite(), torch.inf) for n in norms]

    optimizer._get_norm_groups = norm_groups


def group_norms(optimizer: Any) -> list[Tensor]:
    """Return a list to which each step appends the gradient norm of every group of parameters.

    DeepSpeed itself keeps the norm of all only. Their order is that of `group_players`.
    """
    original = optimizer.get_grad_norm_direct
    found: list[Tensor] = []

    def norm_direct(*arguments: Any) -> Tensor:
        found.append(original(*arguments))
        return found[-1]

    optimizer.get_grad_norm_direct = norm_direct
    return found


def group_players(optimizer: Any) -> list[Player]:
    """Return whose parameters each group holds; stage 3 cuts groups into smaller ones."""
    groups = optimizer.param_groups
    of = getattr(optimizer, "sub_group_to_group_id", None)
    return [groups[of[i]]["player"] for i in sorted(of)] if of else [g["player"] for g in groups]


def complete(
    config: dict[str, Any],
    optimizer: AdamWConfig,
    accelerator: Accelerator,
    micro_batch: int,
    precision: str,
) -> None:
    """Fill in what follows from our own config, so that it stands in one place only."""
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["train_batch_size"] = (
        micro_batch * accelerator.gradient_accumulation_steps * accelerator.num_processes
    )
    config["gradient_clipping"] = optimizer.max_grad_norm or 0.0
    if precision == "bf16":
        # Its autocast keeps fp32 weights, as ours does under DDP; gradients travel in fp32, too.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
