"""AdamW: the one optimizer, so that one canonical checkpoint serves every strategy."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn

from pipeline.component import Component
from pipeline.schedules import WarmupCosine


class AdamWConfig(Component):
    """AdamW (Loshchilov and Hutter 2019) with clipping and a learning-rate schedule."""

    learning_rate: WarmupCosine = WarmupCosine()
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(
        default=None, gt=0
    )  # of the global batch's gradient; null: no clip

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
        """Return the optimizer; one fused kernel, which CPU and CUDA both have."""
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate.peak,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            fused=True,
        )
