"""What a dry run prints: the resolved config, and what the training amounts to."""

from collections.abc import Iterator

from pipeline.common import strict
from pipeline.common.console import in_bytes, progress, warn
from pipeline.config import TrainConfig
from pipeline.data.order.mixture import reading_plan
from pipeline.training.build import build_without_memory, check_data, make_order
from pipeline.training.evaluated import open_evaluated
from pipeline.training.locations import open_data
from pipeline.training.memory import StepMemory
from pipeline.training.sense import doubts
from pipeline.training.start import initial_weights


def describe(config: TrainConfig, *, world: int = 1, with_costs: bool = True) -> str:
    """Return what --dry-run prints: the resolved config as YAML, sizes as comments.

    Warns of what is likely to be a mistake. world: processes that the training is to have.
    with_costs: say what model and step cost, for which parts of torch are imported that take
    seconds. Raises UserError where settings, data or weights do not fit.
    """
    config = config.resolved()
    # Without costs a training follows, which says by itself where its data is read from.
    config, indexes = open_data(config, progress if with_costs else lambda _: None)
    check_data(config, indexes)
    config, _ = open_evaluated(config, progress if with_costs else lambda _: None)
    for what, text in doubts(config, indexes, world):
        warn(f"{what}: {text}")
    order = make_order(config, indexes)
    model = build_without_memory(config)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    initial = initial_weights(config, order)
    steps = order.num_samples / config.batch_size
    comments = [
        *([f"frozen parameters: {frozen:,}"] if frozen else []),
        *([] if initial is None else [initial.line]),
        *(_costs(config, world) if with_costs else []),
        f"reading: {reading_plan(order, world)}",
        f"samples per epoch (split {config.data.split}): {order.num_samples:,}",
        f"steps per epoch: {steps:,.1f}; epochs in {config.num_steps:,} steps: "
        f"{config.num_steps / steps:,.1f}",
    ]
    return strict.dump(config) + "".join(f"# {line}\n" for line in comments)


def _costs(config: TrainConfig, world: int) -> Iterator[str]:
    """Yield what model and step cost, a line each."""
    memory = StepMemory(config, world=world)
    cost, plan = memory.cost, memory.plan
    yield f"parameters: {cost.parameters:,}"
    for name, network in (("encoder", cost.encoder), ("decoder", cost.decoder)):
        yield (
            f"  {name}: {network.parameters:,}, "
            f"{network.flops / 1e9:,.3g} GFLOP per image (forward)"
        )
    latent = " x ".join(map(str, cost.latent_shape))
    yield f"latent: {latent}, {cost.latent_ratio:,.3g} values of an event to 1 of its latent"
    yield (
        f"activations per image: {in_bytes(cost.plain.per_image)}, with gradient checkpointing "
        f"{in_bytes(cost.checkpointed.per_image)}"
    )
    yield (
        f"memory of a step, estimated (ddp): {in_bytes(memory.total)} per process = states "
        f"{in_bytes(memory.states)} + activations of {plan.micro_batch} images "
        f"{in_bytes(plan.activations)}"
    )
