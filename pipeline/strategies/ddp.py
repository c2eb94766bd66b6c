"""One process, or DistributedDataParallel over several: every process holds the whole model."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.models.autoencoder import AutoEncoder
from pipeline.optimizer import AdamWConfig
from pipeline.strategies.base import FullState, Named, StepResult


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
        self._optimizer = optimizer.build(self._parameters)
        self._ema_decay = ema_decay
        self._ema = [p.detach().clone() for p in self._parameters] if ema_decay else []
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
        self._advance_ema(applied)
        return StepResult(grad_norm=norm, applied=applied)

    def _advance_ema(self, applied: Tensor) -> None:
        """ema += (1 - decay_u) * (parameter - ema), decay_u = min(decay, (1 + u) / (10 + u)).

        The ramp (that of diffusers' EMAModel) keeps a young average from remembering the initial
        weights; u counts applied updates.
        """
        if not self._ema:
            return
        decay = ((1.0 + self._num_updates) / (10.0 + self._num_updates)).clamp(max=self._ema_decay)
        change = torch._foreach_sub(self._parameters, self._ema)  # pyright: ignore
        torch._foreach_mul_(change, (1.0 - decay) * applied)  # pyright: ignore
        torch._foreach_add_(self._ema, change)  # pyright: ignore

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Exchange parameters and averages, and back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        assert self._ema, "no moving average is kept"
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._ema[index] = self._ema[index], parameter.data

    def full_state(self) -> FullState:
        """Copy the state to the CPU; no communication, all processes hold the same."""
        return FullState(
            model={name: _to_cpu(value) for name, value in self._module.state_dict().items()},
            ema=self._named(self._ema) if self._ema else None,
            exp_avg=self._moments("exp_avg"),
            exp_avg_sq=self._moments("exp_avg_sq"),
            num_updates=int(self._num_updates.item()),
        )

    def load_full_state(self, state: FullState) -> None:
        """Overwrite parameters, buffers, averages and moments."""
        self._module.load_state_dict(state.model, strict=True)
        if self._ema:
            # A run that turns its average on late starts it from the weights of that moment.
            source = state.ema if state.ema is not None else state.model
            for name, average in zip(self._names, self._ema, strict=True):
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
        states = [self._optimizer.state.get(p, {}) for p in self._parameters]
        pairs = zip(self._names, states, strict=True)
        return {name: _to_cpu(state[kind]) for name, state in pairs if state}

    def _named(self, values: list[Tensor]) -> Named:
        return {name: _to_cpu(value) for name, value in zip(self._names, values, strict=True)}


def _to_cpu(value: Tensor) -> Tensor:
    """A contiguous copy that later updates do not touch."""
    return value.detach().to("cpu", copy=True).contiguous()


def _moment_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment on the parameter's device and in its memory format, as AdamW would create it."""
    moment = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return moment.copy_(value)
