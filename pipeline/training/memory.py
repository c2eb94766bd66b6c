"""Does a training step fit into the memory of its device? An estimate, made before it starts.

weights, gradients, moments, average (docs/clusters.md) + activations of a micro-batch
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import torch

from pipeline.common.console import in_bytes
from pipeline.common.errors import UserError
from pipeline.common.precision import parameter_dtype
from pipeline.config import TrainConfig
from pipeline.distributed.runtime import Runtime
from pipeline.models.autoencoder import num_parameters
from pipeline.models.cost import model_cost, network_cost
from pipeline.training.build import build_without_memory

# What the processes divide between them, by the stage of ZeRO; 0 is DDP. The optimizer of ZeRO
# works on a second copy of the weights.
SHARDED = {
    0: (),
    1: ("gradients", "moments", "copy"),
    2: ("gradients", "moments", "copy"),
    3: ("gradients", "moments", "copy", "weights", "average"),
}
# The part of the memory that an estimate may take and still be advised. The rest is for the work
# space of convolutions, buffers of the exchange, and gaps between tensors.
ADVISED = 0.85
REFUSED = 1.1  # an estimate above this part of the memory ends the start
# A start counts nothing if even so many values for each pixel fit (preset sd keeps 8,800), and
# copies of each weight: a count takes 3 s and more.
MOST_KEPT, MOST_COPIES = 10_000, 6


class StepPlan(NamedTuple):
    """How a step is cut, and the bytes that its activations take by estimate."""

    accumulation: int
    micro_batch: int
    gradient_checkpointing: bool
    activations: int


class StepMemory:
    """Estimated bytes of one process of a training, by its config."""

    def __init__(self, config: TrainConfig, *, world: int, stage: int = 0) -> None:
        """Count; world: processes. stage: of ZeRO, 0 for DDP."""
        shape, precision = config.data.decode.event_shape, config.precision
        self._config, self._world = config, world
        model = build_without_memory(config)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        self.cost = model_cost(config.model, shape, precision, frozen)
        weights, trained, self._judge = self.cost.parameters, self.cost.trained, 0
        if (term := config.objective.adversarial) is not None:
            parameters, per_image = network_cost(
                lambda: term.build_discriminator(shape), shape, precision
            )
            weights, trained = weights + parameters, trained + parameters
            self._judge = 2 * per_image  # it judges images and reconstructions at once
        copies = {"weights": weights, "gradients": trained, "moments": 2 * trained}
        copies["average"] = self.cost.trained * (config.ema_decay is not None)
        copies["copy"] = trained * (stage > 0)
        values = sum(
            -(-count // world) if what in SHARDED[stage] else count
            for what, count in copies.items()
        )
        # Weights, gradients, moments and average.
        self.states = values * parameter_dtype(precision).itemsize
        self.plan = self._plan(config.accumulation, config.model.gradient_checkpointing)

    @property
    def total(self) -> int:
        """Bytes of the config as it is."""
        return self.states + self.plan.activations

    def in_words(self) -> str:
        """Return what a process needs, and for what."""
        return (
            f"by an estimate a process needs {in_bytes(self.total)} (weights, gradients and "
            f"moments {in_bytes(self.states)}, activations of {self.plan.micro_batch} images "
            f"{in_bytes(self.plan.activations)})"
        )

    def remedy(self, room: int) -> str:
        """Say which settings leave some of `room` bytes free: the least accumulation that does."""
        found: list[str] = []
        for checkpointing in sorted({self.plan.gradient_checkpointing, True}):
            for plan in self._plans(checkpointing):
                needed = self.states + plan.activations
                if needed <= ADVISED * room:
                    also = "model.gradient_checkpointing true and " * (
                        checkpointing > self.plan.gradient_checkpointing
                    )
                    what = f"accumulation {plan.accumulation} (micro-batch {plan.micro_batch}"
                    found.append(f"{also}{what}, {in_bytes(needed)})")
                    break
        if found:
            return f"set {', or '.join(found)}"
        return (
            "no accumulation makes it fit: take a smaller model or event, or with several "
            "processes a strategy that divides what training keeps (zero2, zero3)"
        )

    def _plans(self, checkpointing: bool) -> Iterator[StepPlan]:
        """Yield the ways to cut a step that the config allows, the largest micro-batch first."""
        each = self._config.batch_size // self._world
        whole = any(t.scope == "global_batch" for t in self._config.objective.regularisers)
        for accumulation in range(self.plan.accumulation, 2 if whole else each + 1):
            if each % accumulation == 0:
                yield self._plan(accumulation, checkpointing)

    def _plan(self, accumulation: int, checkpointing: bool) -> StepPlan:
        micro_batch = max(self._config.batch_size // (self._world * accumulation), 1)
        kept = self.cost.checkpointed if checkpointing else self.cost.plain
        activations = kept.of(micro_batch) + self._judge * micro_batch
        return StepPlan(accumulation, micro_batch, checkpointing, activations)


def check_memory(config: TrainConfig, runtime: Runtime) -> None:
    """Raise UserError if a step cannot fit into the memory of this process's device.

    Also if `freeze` does not fit the model. On a GPU all its memory counts; on a CPU what is
    available, for this process alone.
    """
    if runtime.device.type == "cuda":
        room = torch.cuda.get_device_properties(runtime.device).total_memory
        where = f"{in_bytes(room)} of {torch.cuda.get_device_name(runtime.device)}"
    else:
        room = psutil.virtual_memory().available
        where = f"{in_bytes(room)} of memory that are available here"
    if _surely_fits(config, runtime.world, room):
        return
    plugin: Any = runtime.accelerator.state.deepspeed_plugin if runtime.uses_deepspeed else None
    memory = StepMemory(config, world=runtime.world, stage=plugin.zero_stage if plugin else 0)
    if memory.states > room or memory.total > REFUSED * room:
        raise UserError(
            f"a step does not fit: {memory.in_words()}, more than the {where}; "
            f"{memory.remedy(room)}."
        )


def _surely_fits(config: TrainConfig, world: int, room: int) -> bool:
    """Whether a step fits by a bound that is far too high for most."""
    model = build_without_memory(config)
    shape = model.event_shape
    pixels = math.prod(shape[1:]) if len(shape) == 3 else math.prod(shape)
    images = max(config.batch_size // (world * config.accumulation), 1)
    values = MOST_KEPT * images * pixels + MOST_COPIES * num_parameters(model)
    return values * parameter_dtype(config.precision).itemsize < room
