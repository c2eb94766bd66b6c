"""DeepSpeed ZeRO-1, 2 and 3: optimizer states, gradients and parameters in shards.

    stage 1, 2   every process holds all parameters; moments are shards of flat buffers
    stage 3      parameters as well: a padded, flat shard per process and parameter (`ds_tensor`)

Precision, clipping, skipping, learning rate and moving average are those of `ddp`; DeepSpeed's own
checkpoints, schedulers and precision modes are not used. tests/distributed/ tests the facts about
DeepSpeed's internals on which this file relies.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.common.errors import UserError
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
from pipeline.distributed.strategies.zero_engine import (
    check_norms_in_float32,
    fill_in_config,
    group_norms,
    group_players,
)
from pipeline.losses.players import Player, checkpoint_name
from pipeline.losses.terms.adversarial import DiscriminatorConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroStrategy:
    """AdamW in shards on fp32 parameters, under bf16 autocast where the config says so."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: AdamWConfig,
        discriminator: DiscriminatorConfig | None = None,
        ema_decay: float | None,
        accelerator: Accelerator,
        micro_batch: int,
        precision: str,
    ) -> None:
        """Wrap `model`; `micro_batch`: samples of one process in one forward pass."""
        deepspeed: Any = import_module("deepspeed")  # an extra
        if precision == "fp64":
            raise UserError("precision fp64 runs in one process or under DDP, not under DeepSpeed.")
        # DeepSpeed views flattened parameters as bytes, which channels-last memory does not allow.
        model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self._tools: Any = deepspeed.utils
        self._device = accelerator.device
        self._module = model
        self._parameters = Parameters(model)
        self._initial: FullState | None = FullState(
            model={checkpoint_name(n): to_cpu(value) for n, value in model.state_dict().items()},
            ema=None,
            exp_avg={},
            exp_avg_sq={},
        )
        plugin: Any = accelerator.state.deepspeed_plugin
        self._stage = int(plugin.zero_stage)
        fill_in_config(plugin.deepspeed_config, optimizer, accelerator, micro_batch, precision)
        self._engine: Any
        self._engine, _ = accelerator.prepare(model, optimizer.build(model, discriminator))
        found = type(self._engine).__name__
        if not isinstance(self._engine, deepspeed.DeepSpeedEngine):
            raise RuntimeError(f"accelerate wrapped the model as {found}, not for DeepSpeed")
        if self._engine.zero_optimization_stage() != self._stage or self._stage not in (1, 2, 3):
            raise UserError(
                f"DeepSpeed runs ZeRO stage {self._engine.zero_optimization_stage()}, the topology "
                f"file asks for {self._stage}: choose stage 1, 2 or 3."
            )
        if self._stage == 3:
            check_norms_in_float32(self._engine.optimizer)
        self._group_norms = group_norms(self._engine.optimizer)
        self.model: nn.Module = self._engine
        self._num_updates = torch.zeros((), device=self._device)
        self._average = MovingAverage(self._averaged(), ema_decay) if ema_decay else None

    def warm_up(self, loss: Tensor) -> None:
        """Take one step, which creates the moments, and restore the initial state."""
        assert self._initial is not None, "already warmed up"
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss)
        self._engine.step()
        if self._stage < 3:
            # DeepSpeed links moments to parameters once, after the step of the first parameter
            # group, when the moments of the second group do not exist yet. So link them again.
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        self.load_full_state(self._initial)
        self._initial = None

    def set_learning_rates(self, rates: Mapping[Player, float]) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rates[group["player"]]

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # The engine divides by the accumulation and the number of ranks.
        self._engine.backward(loss)

    def step(self) -> StepResult:
        # The engine skips the update if the norm is not finite.
        self._group_norms.clear()
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        norm = norm.to(self._device)
        applied = torch.tensor(float(not self._engine.optimizer.overflow), device=self._device)
        self._num_updates += applied
        if self._average is not None:
            self._average.advance(self._averaged(), self._num_updates, applied)
        return StepResult(norm, self._discriminator_norm(), applied)

    @contextmanager
    def averaged(self) -> Generator[None]:
        assert self._average is not None, "no moving average is kept"
        self._release()
        self._average.exchange(self._averaged())
        try:
            yield
        finally:
            self._release()
            self._average.exchange(self._averaged())

    def full_state(self, *, wanted: bool = True, into: FullState | None = None) -> FullState:
        into = into or empty_state()
        model: Named = {}
        for name, buffer in self._parameters.buffers.items() if wanted else ():
            model[name] = to_cpu(buffer, into.model.get(name))
        parameters = self._parameters
        held = map(self._held, parameters.all.values())
        model |= self._gathered(parameters.all, held, wanted, into.model)
        ema: Named | None = None
        if self._average is not None:
            averages = self._average.averages
            ema = self._gathered(parameters.averaged, averages, wanted, into.ema or {})
        return FullState(
            model=model,
            ema=ema,
            exp_avg=self._moments("exp_avg", wanted, into.exp_avg),
            exp_avg_sq=self._moments("exp_avg_sq", wanted, into.exp_avg_sq),
            num_updates=int(self._num_updates.item()),
        )

    @torch.no_grad()
    def load_full_state(self, state: FullState) -> None:
        self._release()
        for name, buffer in self._parameters.buffers.items():
            buffer.copy_(state.model[name])
        for name, parameter in self._parameters.all.items():
            self._held(parameter).copy_(self._mine(parameter, state.model[name]))
            if name not in self._parameters.trainable:
                continue
            self._set(parameter, None, state.model[name])
            for kind in MOMENTS:
                moments: Named = getattr(state, kind)
                value = moments.get(name)
                zero = torch.zeros_like(state.model[name])
                self._set(parameter, kind, zero if value is None else value)
        for adam in self._engine.optimizer.optimizer.state.values():
            if "step" in adam:
                adam["step"].fill_(state.num_updates)
        self._num_updates.fill_(state.num_updates)
        if self._average is not None:
            # What has no average yet starts from the current weights.
            source = state.model | (state.ema or {})
            columns = zip(self._parameters.averaged.items(), self._average.averages, strict=True)
            for (name, parameter), average in columns:
                average.copy_(self._mine(parameter, source[name]))

    def _release(self) -> None:
        """Make stage 3 gather every parameter again before its next use.

        After a forward pass without a backward, as in an evaluation, it keeps some parameters
        whole, and would ignore what is written into their shards.
        """
        if self._stage == 3:
            self._engine.optimizer._partition_all_parameters()

    def _held(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole parameter, or under stage 3 this process's shard of it."""
        return parameter.data if self._stage < 3 else cast(Any, parameter).ds_tensor.data

    def _averaged(self) -> list[Tensor]:
        return list(map(self._held, self._parameters.averaged.values()))

    def _discriminator_norm(self) -> Tensor | None:
        """Return the discriminator's part of the last step's gradient norm; no host sync."""
        if not self._parameters.discriminator:
            return None
        players = group_players(self._engine.optimizer)
        columns = zip(players, self._group_norms, strict=True)
        own = [norm.float() for player, norm in columns if player == "discriminator"]
        return torch.linalg.vector_norm(torch.stack(own))

    def _mine(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Return this process's part of a whole value."""
        assert value.shape == self._shape(parameter), "padding would hide another model's weights"
        value = value.to(self._device)
        if self._stage < 3:
            return value
        size, rank = cast(Any, parameter).ds_tensor.numel(), dist.get_rank()
        flat = value.reshape(-1)
        padded = torch.zeros(size * dist.get_world_size(), dtype=flat.dtype, device=flat.device)
        padded[: flat.numel()] = flat
        return padded[rank * size : (rank + 1) * size]

    def _set(self, parameter: nn.Parameter, kind: str | None, value: Tensor) -> None:
        """Overwrite the optimizer's copy of a parameter (kind None), or one of its moments."""
        mine = self._mine(parameter, value)
        reach = "local" if self._stage == 3 else "full"
        if kind is None:
            getattr(self._tools, f"safe_set_{reach}_fp32_param")(parameter, mine)
        else:
            getattr(self._tools, f"safe_set_{reach}_optimizer_state")(parameter, mine, kind)

    def _moments(self, kind: str, wanted: bool, into: Named) -> Named:
        """Return one of Adam's moments of all parameters; a collective, even if not wanted."""
        moments: Named = {}
        if self._num_updates.item() == 0:
            return moments  # as in `ddp`: none before the first update
        for name, parameter in self._parameters.trainable.items():
            whole = self._tools.safe_get_full_optimizer_state(parameter, kind)
            if wanted:
                moments[name] = to_cpu(whole.view(self._shape(parameter)), into.get(name))
        return moments

    def _gathered(
        self,
        parameters: Mapping[str, nn.Parameter],
        held: Iterable[Tensor],
        wanted: bool,
        into: Named,
    ) -> Named:
        """Return whole values from the parts of all processes; a collective under stage 3."""
        whole: Named = {}
        for (name, parameter), mine in zip(parameters.items(), held, strict=True):
            shape = self._shape(parameter)
            if self._stage == 3:
                parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, mine.contiguous())
                mine = torch.cat(parts)[: shape.numel()]
            if wanted:
                whole[name] = to_cpu(mine.view(shape), into.get(name))
        return whole

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return torch.Size(cast(Any, parameter).ds_shape) if self._stage == 3 else parameter.shape
