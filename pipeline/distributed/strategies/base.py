"""What the training loop asks of a way to distribute the model.

Add a strategy: one file with a class that has these methods, and its name in `build.make_strategy`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.losses.players import Player, checkpoint_name, player_of

Named = dict[str, Tensor]


@dataclass
class FullState:
    """Canonical training state, by parameter name, of any strategy: see `checkpoints.folder`."""

    model: Named  # parameters and buffers; of a discriminator, too
    ema: Named | None  # averaged parameters, of the autoencoder
    exp_avg: Named  # Adam's first moments; empty before the first update
    exp_avg_sq: Named  # Adam's second moments; empty before the first update
    num_updates: int = field(default=0)  # updates applied: Adam's step, the EMA's clock


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, on the device."""

    grad_norm: Tensor  # of the mean gradient over the global batch, before clipping
    discriminator_norm: Tensor | None  # the discriminator's part of it
    applied: Tensor  # 1.0, or 0.0 if the norm was not finite and the update was skipped


class Parameters:
    """Parameters and buffers of a trained module, by the names that a checkpoint gives them."""

    def __init__(self, module: nn.Module) -> None:
        named = [(checkpoint_name(name), value) for name, value in module.named_parameters()]
        self.all = dict(named)
        # What has moments, and what an average follows.
        self.trainable = {name: value for name, value in named if value.requires_grad}
        self.averaged = {
            name: value
            for name, value in self.trainable.items()
            if player_of(name) == "autoencoder"
        }
        kept = module.state_dict().keys()  # a buffer may say that it is not to be kept
        self.buffers = {
            checkpoint_name(name): value for name, value in module.named_buffers() if name in kept
        }
        self.discriminator = [
            value for name, value in self.trainable.items() if player_of(name) == "discriminator"
        ]


def empty_state(num_updates: int = 0) -> FullState:
    """A state without tensors."""
    return FullState({}, None, {}, {}, num_updates)


def to_cpu(value: Tensor, into: Tensor | None = None) -> Tensor:
    """A contiguous copy that later updates do not touch; in the memory of `into`, if given."""
    if into is None:
        into = torch.empty(value.shape, dtype=value.dtype)
    return into.copy_(value.detach())


class Strategy(Protocol):
    """A wrapped model with its optimizer and moving average."""

    model: nn.Module  # wrapped: call it, never its parts

    def warm_up(self, loss: Tensor) -> None:
        """Run the throw-away first backward: `loss` is a zero that depends on every parameter."""
        ...

    def set_learning_rates(self, rates: Mapping[Player, float]) -> None:
        """Set the players' rates of the next update; before its first backward."""
        ...

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surround forward and backward of a micro-batch; gradients are exchanged in the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, divided by the accumulation."""
        ...

    def step(self) -> StepResult:
        """Clip, update, advance the EMA, clear gradients; without a host sync."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Have the model hold the averaged parameters inside the context."""
        ...

    def full_state(self, *, wanted: bool = True, into: FullState | None = None) -> FullState:
        """Gather the canonical state in CPU memory; a collective.

        wanted: whether this process needs it; else the tensors are left out. into: a former result
        of this method that is needed no more: its memory is used again, for fetching new memory
        from the system takes longer than the copy. Later updates do not touch what is returned.
        """
        ...

    def load_full_state(self, state: FullState) -> None:
        """Take over a canonical state."""
        ...
