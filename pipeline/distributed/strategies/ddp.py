"""One process, or DistributedDataParallel over several: every process holds the whole model."""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.optimizer import AdamWConfig
from pipeline.distributed.strategies.average import MovingAverage
from pipeline.distributed.strategies.base import FullState, Named, StepResult, no_state, to_cpu
from pipeline.models.autoencoder import AutoEncoder


class DdpStrategy:
    """AdamW on fp32 (or fp64) parameters that every process holds."""

    def __init__(
        self,
        model: AutoEncoder,
        *,
        optimizer: AdamWConfig,
        ema_decay: float | None,
        accelerator: Accelerator,
    ) -> None:
        """Wrap `model`; its parameters must be on the accelerator's device already."""
        self._accelerator = accelerator
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._module = model
        self._max_grad_norm = optimizer.max_grad_norm
        self._optimizer = optimizer.build(model)
        self._average = MovingAverage(self._parameters, ema_decay) if ema_decay else None
        self._num_updates = torch.zeros((), device=accelerator.device)
        self.model: nn.Module
        self.model, self._prepared = accelerator.prepare(model, self._optimizer)
        if accelerator.num_processes > 1 and not isinstance(self.model, DistributedDataParallel):
            name = type(self.model).__name__
            raise RuntimeError(f"accelerate wrapped the model as {name}, not for DDP")

    def warm_up(self, loss: Tensor) -> None:
        """Run one backward whose gradient is dropped.

        DDP regroups its buckets after the first backward, and the order of float additions changes
        with them: spent here, a resumed run adds in the same order as an uninterrupted one.
        """
        self._accelerator.backward(loss)
        self._prepared.zero_grad(set_to_none=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next update."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Exchange gradients in the last micro-batch of a step only."""
        return nullcontext() if is_last else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; accelerate divides by accumulation, DDP by ranks."""
        self._accelerator.backward(loss)

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip and update, unless the norm is not finite: then nothing moves.

        The decision stays on the device: fused AdamW takes it as `found_inf`, as a gradient scaler
        would hand it over, and leaves parameters, moments and its step as they were.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
        applied = norm.isfinite().to(torch.float32)
        # An attribute that torch's own GradScaler sets from outside; no stub knows it.
        setattr(self._optimizer, "found_inf", 1.0 - applied)  # noqa: B010
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        self._num_updates += applied
        if self._average is not None:
            self._average.advance(self._parameters, self._num_updates, applied)
        return StepResult(grad_norm=norm, applied=applied)

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Exchange parameters and averages, and back."""
        assert self._average is not None, "no moving average is kept"
        self._average.exchange(self._parameters)
        try:
            yield
        finally:
            self._average.exchange(self._parameters)

    def full_state(self, *, wanted: bool = True, into: FullState | None = None) -> FullState:
        """Copy the state to the CPU; no communication, all processes hold the same."""
        num_updates = int(self._num_updates.item())
        if not wanted:
            return no_state(num_updates)
        into = into or no_state()
        ema: Named | None = None
        if self._average is not None:
            averages = dict(zip(self._names, self._average.averages, strict=True))
            ema = _copies(averages, into.ema or {})
        return FullState(
            model=_copies(self._module.state_dict(), into.model),
            ema=ema,
            exp_avg=_copies(self._moments("exp_avg"), into.exp_avg),
            exp_avg_sq=_copies(self._moments("exp_avg_sq"), into.exp_avg_sq),
            num_updates=num_updates,
        )

    def load_full_state(self, state: FullState) -> None:
        """Overwrite parameters, buffers, averages and moments."""
        self._module.load_state_dict(state.model, strict=True)
        if self._average is not None:
            # A run that turns its average on late starts it from the weights of that moment.
            source = state.ema if state.ema is not None else state.model
            for name, average in zip(self._names, self._average.averages, strict=True):
                average.copy_(source[name])
        self._num_updates.fill_(state.num_updates)
        self._optimizer.state.clear()  # a state before the first update has no moments
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if name not in state.exp_avg:
                continue
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.num_updates), device=parameter.device),
                "exp_avg": _moment_like(parameter, state.exp_avg[name]),
                "exp_avg_sq": _moment_like(parameter, state.exp_avg_sq[name]),
            }

    def _moments(self, kind: str) -> Named:
        """One of Adam's moments by name; empty before the first update."""
        states = [self._optimizer.state.get(p, {}) for p in self._parameters]
        return {n: state[kind] for n, state in zip(self._names, states, strict=True) if state}


def _copies(values: Mapping[str, Tensor], into: Named) -> Named:
    return {name: to_cpu(value, into.get(name)) for name, value in values.items()}


def _moment_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment on the parameter's device and in its memory format, as AdamW would create it."""
    moment = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return moment.copy_(value)
