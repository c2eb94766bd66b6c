"""Rows of all processes together, for losses that depend on the whole global batch."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class RowGather:
    """[B, ...] of each process -> [processes * B, ...], in the order of the ranks.

    The gradient of a row is the sum of what all processes ask of it, and returns to its owner: with
    losses that each process takes over its own rows, and engines that average over the processes,
    that is the gradient of the mean over the global batch. A collective, forward and backward.
    """

    @property
    def rank(self) -> int:
        """Whose rows stand at [rank * B, (rank + 1) * B) are this process's."""
        return dist.get_rank() if dist.is_initialized() else 0

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes; every process gives equally many."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return rows
        if rows.dtype == torch.bool:  # which gloo does not carry
            return self(rows.to(torch.uint8)).bool()
        return cast(Tensor, _AllGather.apply(rows))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Concatenate the rows of all ranks."""
        ctx.num_rows = len(rows)
        parts = [rows.new_empty(rows.shape) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        """Sum the gradient over the ranks and take this rank's rows."""
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        start = dist.get_rank() * ctx.num_rows
        return summed[start : start + ctx.num_rows]
