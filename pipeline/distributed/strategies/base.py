"""The interface of strategies: what the training loop needs of a distributed model.

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
    """Training state by parameter name, the same for every strategy: see `checkpoints.folder`."""

    model: Named  # parameters and buffers, those of a discriminator included
    ema: Named | None  # averaged parameters of the autoencoder
    exp_avg: Named  # Adam's first moments; empty before the first update
    exp_avg_sq: Named  # Adam's second moments; empty before the first update
    num_updates: int = field(default=0)  # updates applied: the step of Adam and of the EMA


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
        # The trainable parameters have moments; `averaged` are those that have an average.
        self.trainable = {name: value for name, value in named if value.requires_grad}
        self.averaged = {
            name: value
            for name, value in self.trainable.items()
            if player_of(name) == "autoencoder"
        }
        kept = module.state_dict().keys()  # without non-persistent buffers
        self.buffers = {
            checkpoint_name(name): value for name, value in module.named_buffers() if name in kept
        }
        self.discriminator = [
            value for name, value in self.trainable.items() if player_of(name) == "discriminator"
        ]


def empty_state(num_updates: int = 0) -> FullState:
    """Return a state without tensors."""
    return FullState({}, None, {}, {}, num_updates)


def to_cpu(value: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a contiguous copy in CPU memory; in that of `into`, if given."""
    if into is None:
        into = torch.empty(value.shape, dtype=value.dtype)
    return into.copy_(value.detach())


class Strategy(Protocol):
    """A wrapped model with its optimizer and moving average."""

    model: nn.Module  # wrapped: call the whole, never its submodules

    def warm_up(self, loss: Tensor) -> None:
        """Run a first backward that changes nothing; `loss`: 0, depends on every parameter."""
        ...

    def set_learning_rates(self, rates: Mapping[Player, float]) -> None:
        """Set the players' learning rates; called before the first backward of an update."""
        ...

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch's forward and backward; the last one exchanges gradients."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, divided by the accumulation."""
        ...

    def step(self) -> StepResult:
        """Clip, update, advance the EMA, clear gradients; without a host sync."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Give the model the averaged parameters inside the context."""
        ...

    def full_state(self, *, wanted: bool = True, into: FullState | None = None) -> FullState:
        """Gather the canonical state in CPU memory; a collective.

        wanted: whether this process needs the tensors; otherwise they are left out. into: a former
        result of this method, whose memory is reused: allocating it anew takes longer than the
        copy. Later updates do not change the result.
        """
        ...

    def load_full_state(self, state: FullState) -> None:
        """Load a canonical state."""
        ...
