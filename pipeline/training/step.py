"""One step of the training: micro-batches of one global batch -> one update."""

from pipeline.config import TrainConfig
from pipeline.data.stream.batch import Batch
from pipeline.distributed.strategies.base import Strategy
from pipeline.monitoring.meter import TrainingMeter
from pipeline.training.forward import Forward


def train_step(
    batch: Batch,
    samples: int,
    config: TrainConfig,
    forward: Forward,
    strategy: Strategy,
    meter: TrainingMeter,
) -> object:
    """Update once, from this process's part of one global batch, after `samples` seen samples.

    Returns the last micro-batch's inputs and outputs, which the caller keeps until the next call:
    if all memory of a step is freed at once, the CPU's allocator returns it to the system, and
    fetching it again, page by page, costs about a tenth of a step.
    """
    weights = config.objective.weights_at(samples)
    strategy.set_learning_rates(config.learning_rates_at(samples))
    parts = batch.split(config.accumulation)
    kept: object = None
    for number, part in enumerate(parts, start=1):
        inputs = forward.inputs(part, "train")
        with strategy.accumulate(is_last=number == len(parts)):
            output, losses = forward.run(strategy.model, inputs, weights=weights, samples=samples)
            # A constant divisor, not the sum of weights: engines average over ranks.
            strategy.backward((losses.total * inputs.weight).sum() / len(inputs.weight))
        meter.add(losses, inputs.weight)
        kept = (inputs, output, losses)
    meter.add_step(strategy.step())
    return kept


def check_skipped(num_skipped: float, config: TrainConfig) -> None:
    """Raise if more updates were skipped than the config allows."""
    if num_skipped > config.max_skipped_steps:
        raise RuntimeError(
            f"{num_skipped:.0f} updates were skipped because their gradient was not finite: more "
            f"than max_skipped_steps {config.max_skipped_steps}. A lower "
            "optimizer.learning_rate.peak or an optimizer.max_grad_norm often helps; the last "
            "checkpoint holds finite weights."
        )
