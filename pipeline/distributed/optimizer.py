"""AdamW, the only optimizer: so all strategies share one checkpoint format."""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from pipeline.common.component import Component
from pipeline.common.schedules import WarmupCosine
from pipeline.losses.players import PLAYERS, player_of
from pipeline.losses.terms.adversarial import DiscriminatorConfig


class AdamWConfig(Component):
    """AdamW (Loshchilov and Hutter 2019) with clipping and a learning-rate schedule."""

    learning_rate: WarmupCosine = WarmupCosine()
    beta1: float = Field(default=0.9, ge=0, lt=1)  # decay of the mean of gradients, per update
    beta2: float = Field(default=0.999, ge=0, lt=1)  # decay of the mean of their squares
    epsilon: float = Field(default=1e-8, gt=0)  # added to the root in the denominator
    # Of weight matrices and kernels; biases, scales and a learned sigma are not decayed.
    weight_decay: float = Field(default=0.0, ge=0)
    # Bound of the norm of the global batch's gradient; null: no clipping.
    max_grad_norm: float | None = Field(default=None, gt=0)

    def build(
        self, model: nn.Module, discriminator: DiscriminatorConfig | None = None
    ) -> torch.optim.AdamW:
        """Return the optimizer, fused on CPU and CUDA.

        Each player has two parameter groups, with and without weight decay; the key `player` of a
        group names its player.
        """
        groups: list[dict[str, Any]] = []
        for player in PLAYERS:
            own = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and player_of(name) == player
            ]
            settings: dict[str, Any] = {"player": player}
            if player == "discriminator" and discriminator is not None:
                settings["betas"] = (
                    self.beta1 if discriminator.beta1 is None else discriminator.beta1,
                    self.beta2 if discriminator.beta2 is None else discriminator.beta2,
                )
            for decay, some in (
                (self.weight_decay, [p for p in own if p.ndim > 1]),
                (0.0, [p for p in own if p.ndim <= 1]),
            ):
                if some:
                    groups.append({"params": some, "weight_decay": decay, **settings})
        return torch.optim.AdamW(
            groups,
            lr=self.learning_rate.peak,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )
