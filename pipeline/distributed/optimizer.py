"""AdamW: the one optimizer, so that one canonical checkpoint serves every strategy."""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from pipeline.common.component import Component
from pipeline.common.schedules import WarmupCosine


class AdamWConfig(Component):
    """AdamW (Loshchilov and Hutter 2019) with clipping and a learning-rate schedule."""

    learning_rate: WarmupCosine = WarmupCosine()
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    # Of weight matrices and kernels; biases, scales and a learned sigma are not decayed.
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(
        default=None, gt=0
    )  # of the global batch's gradient; null: no clip

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """Return the optimizer; one fused kernel, which CPU and CUDA both have."""
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate.peak,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )
