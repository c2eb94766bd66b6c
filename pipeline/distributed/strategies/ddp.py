"""One process, or DistributedDataParallel over several; every process holds the whole model."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.optimizer import AdamWConfig
from pipeline.distributed.strategies.average import MovingAverage
from pipeline.distributed.strategies.base import (
    FullState,
    Named,
    Parameters,
    StepResult,
    empty_state,
    to_cpu,
)
from pipeline.losses.players import Player, checkpoint_name
from pipeline.losses.terms.adversarial import DiscriminatorConfig


class DdpStrategy:
    """AdamW on fp32 (or fp64) parameters that every process holds."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: AdamWConfig,
        discriminator: DiscriminatorConfig | None = None,
        ema_decay: float | None,
        accelerator: Accelerator,
    ) -> None:
        """Wrap `model`; its parameters must be on the accelerator's device already."""
        self._accelerator = accelerator
        self._module = model
        self._parameters = Parameters(model)
        self._max_grad_norm = optimizer.max_grad_norm
        self._optimizer = optimizer.build(model, discriminator)
        self._average = MovingAverage(self._averaged(), ema_decay) if ema_decay else None
        self._num_updates = torch.zeros((), device=accelerator.device)
        self.model: nn.Module
        self.model, self._prepared = accelerator.prepare(model, self._optimizer)
        if accelerator.num_processes > 1 and not isinstance(self.model, DistributedDataParallel):
            name = type(self.model).__name__
            raise RuntimeError(f"accelerate wrapped the model as {name}, not for DDP")

    def warm_up(self, loss: Tensor) -> None:
        """Run one backward whose gradient is dropped.

        DDP regroups its buckets after the first backward, which changes the order of float
        additions. Regrouped here, a resumed run adds in the same order as an uninterrupted one.
        """
        self._accelerator.backward(loss)
        self._prepared.zero_grad(set_to_none=True)

    def set_learning_rates(self, rates: Mapping[Player, float]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rates[group["player"]]

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        # accelerate divides by the accumulation, DDP by the number of ranks.
        self._accelerator.backward(loss)

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip and update; change nothing if the norm is not finite.

        The decision stays on the device: fused AdamW reads `found_inf`, as a gradient scaler sets
        it, and leaves parameters, moments and its step unchanged.
        """
        trained = list(self._parameters.trainable.values())
        norm = _norm(trained)
        discriminator = self._parameters.discriminator
        discriminator_norm = _norm(discriminator) if discriminator else None
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self._max_grad_norm, norm)
        applied = norm.isfinite().to(torch.float32)
        # torch's GradScaler sets this attribute from outside, too; the type stubs lack it.
        setattr(self._optimizer, "found_inf", 1.0 - applied)  # noqa: B010
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        self._num_updates += applied
        if self._average is not None:
            self._average.advance(self._averaged(), self._num_updates, applied)
        return StepResult(norm, discriminator_norm, applied)

    @contextmanager
    def averaged(self) -> Generator[None]:
        assert self._average is not None, "no moving average is kept"
        self._average.exchange(self._averaged())
        try:
            yield
        finally:
            self._average.exchange(self._averaged())

    def full_state(self, *, wanted: bool = True, into: FullState | None = None) -> FullState:
        # No communication: all processes hold the same state.
        num_updates = int(self._num_updates.item())
        if not wanted:
            return empty_state(num_updates)
        into = into or empty_state()
        ema: Named | None = None
        if self._average is not None:
            averages = dict(zip(self._parameters.averaged, self._average.averages, strict=True))
            ema = _copies(averages, into.ema or {})
        return FullState(
            model=_copies(self._state(), into.model),
            ema=ema,
            exp_avg=_copies(self._moments("exp_avg"), into.exp_avg),
            exp_avg_sq=_copies(self._moments("exp_avg_sq"), into.exp_avg_sq),
            num_updates=num_updates,
        )

    def load_full_state(self, state: FullState) -> None:
        names = {checkpoint_name(name): name for name in self._module.state_dict()}
        whole = {names.get(name, name): value for name, value in state.model.items()}
        self._module.load_state_dict(whole, strict=True)
        if self._average is not None:
            # What has no average yet starts from the current weights.
            source = state.model | (state.ema or {})
            columns = zip(self._parameters.averaged, self._average.averages, strict=True)
            for name, average in columns:
                average.copy_(source[name])
        self._num_updates.fill_(state.num_updates)
        self._optimizer.state.clear()
        for name, parameter in self._parameters.trainable.items():
            if name not in state.exp_avg and state.num_updates == 0:
                continue  # before the first update there are no moments
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.num_updates), device=parameter.device),
                "exp_avg": _moment_like(parameter, state.exp_avg.get(name)),
                "exp_avg_sq": _moment_like(parameter, state.exp_avg_sq.get(name)),
            }

    def _moments(self, kind: str) -> Named:
        """One of Adam's moments by name; empty before the first update."""
        states = {n: self._optimizer.state.get(p) for n, p in self._parameters.trainable.items()}
        return {name: state[kind] for name, state in states.items() if state}

    def _averaged(self) -> list[nn.Parameter]:
        return list(self._parameters.averaged.values())

    def _state(self) -> Named:
        """Parameters and buffers, by the names of a checkpoint."""
        return {checkpoint_name(name): t for name, t in self._module.state_dict().items()}


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _copies(values: Mapping[str, Tensor], into: Named) -> Named:
    return {name: to_cpu(value, into.get(name)) for name, value in values.items()}


def _moment_like(parameter: Tensor, value: Tensor | None) -> Tensor:
    """Return a moment on the parameter's device, in its memory format, as AdamW creates it.

    None: of a parameter that was frozen so far.
    """
    moment = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return moment if value is None else moment.copy_(value)
