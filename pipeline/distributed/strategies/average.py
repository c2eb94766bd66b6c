"""Exponential moving average of the parameters, in the layout of the strategy."""

from collections.abc import Sequence

import torch
from torch import Tensor


class MovingAverage:
    """ema += (1 - decay_u) * (value - ema), with decay_u = min(decay, (1 + u) / (10 + u)).

    u counts applied updates. The ramp, as in diffusers' EMAModel, keeps the initial weights from
    staying in a young average. `values` are always this process's tensors: whole parameters, or its
    shards of them.
    """

    def __init__(self, values: Sequence[Tensor], decay: float) -> None:
        """Start from a copy of `values`."""
        self.averages = [value.detach().clone() for value in values]
        self._decay = decay

    @torch.no_grad()
    def advance(self, values: Sequence[Tensor], num_updates: Tensor, applied: Tensor) -> None:
        """Update the averages, unless `applied` is 0; without a host sync."""
        decay = ((1.0 + num_updates) / (10.0 + num_updates)).clamp(max=self._decay)
        change = torch._foreach_sub(list(values), self.averages)  # pyright: ignore
        torch._foreach_mul_(change, (1.0 - decay) * applied)  # pyright: ignore
        torch._foreach_add_(self.averages, change)  # pyright: ignore

    @torch.no_grad()
    def exchange(self, values: Sequence[Tensor]) -> None:
        """Swap the contents of values and averages, in place."""
        for value, average in zip(values, self.averages, strict=True):
            copy = value.detach().clone()
            value.copy_(average)
            average.copy_(copy)
