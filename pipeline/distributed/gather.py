"""Differentiable all-gather, for losses that depend on the whole global batch."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class RowGather:
    """[B, ...] of each process -> [processes * B, ...], by rank; a collective, backward as well.

    Backward sums the gradient of a row over all processes and returns it to the row's process. Each
    process takes losses over its own rows, and DDP and DeepSpeed average over processes: together
    that is the gradient of the mean over the global batch.
    """

    @property
    def rank(self) -> int:
        """Rank of this process, whose rows are [rank * B, (rank + 1) * B)."""
        return dist.get_rank() if dist.is_initialized() else 0

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes; B must be equal on all."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return rows
        if rows.dtype == torch.bool:  # gloo has no bool
            return self(rows.to(torch.uint8)).bool()
        return cast(Tensor, _AllGather.apply(rows))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [rows.new_empty(rows.shape) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        start = dist.get_rank() * ctx.num_rows
        return summed[start : start + ctx.num_rows]
