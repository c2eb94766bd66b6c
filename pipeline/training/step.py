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

    Returns what the last micro-batch went in and came out with. Hold it until the next call: if all
    of a step's memory is freed at once, the CPU's allocator gives it back to the system and fetches
    it anew, page by page, which costs about a tenth of a step.
    """
    weights = config.objective.weights_at(samples)
    strategy.set_learning_rates(config.learning_rates_at(samples))
    parts = batch.split(config.accumulation)
    held: object = None
    for number, part in enumerate(parts, start=1):
        inputs = forward.inputs(part, "train")
        with strategy.accumulate(is_last=number == len(parts)):
            output, losses = forward.run(strategy.model, inputs, weights=weights, samples=samples)
            # A constant divisor, not the sum of weights: engines average over ranks.
            strategy.backward((losses.total * inputs.weight).sum() / len(inputs.weight))
        meter.add(losses, inputs.weight)
        held = (inputs, output, losses)
    meter.add_step(strategy.step())
    return held
