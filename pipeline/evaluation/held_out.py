"""Held-out evaluation of a run, while it trains and, by `latentmill evaluate RUN`, afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from pipeline.checkpoints.folder import read_state
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.stream import open_stream
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.datasets import open_indexes
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.evaluation.reconstruction import Evaluation, evaluate
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.monitor import Monitor
from pipeline.training.build import make_forward, place_model
from pipeline.training.forward import Forward
from pipeline.training.run_directory import (
    Step,
    check_ranks,
    choose_checkpoint,
    load_config,
    load_run,
)


def evaluate_split(
    model: nn.Module,
    config: TrainConfig,
    *,
    step: int,
    forward: Forward,
    indexes: Sequence[Index],
    runtime: Runtime,
    quarantine: Quarantine,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate `model` as it stands on the config's held-out split; a collective.

    The losses carry the regularisers' weights of `step`. Samples that could not be used are taken
    into `quarantine`. before_batch: may raise, on all processes together.
    """
    num_tombstones = 0.0

    def batches() -> Iterator[Batch]:
        """Every data set in turn, each once, not augmented."""
        nonlocal num_tombstones
        for source, index in zip(config.data.sources, indexes, strict=True):
            held_out = {"split": config.evaluation.split, "augmentations": ()}
            single = {"path": source.path, "shards": source.shards, "mixture": ()}
            if not index.counts(config.evaluation.split).any():
                continue
            with open_stream(
                config.data.model_copy(update=held_out | single),
                index=index,
                seed=config.seed,
                batch_size=config.batch_size,
                rank=runtime.rank,
                world=runtime.world,
                tail="mask",
                device=runtime.device,
            ) as stream:
                for batch in DeviceBatches(stream, runtime.device):
                    before_batch()
                    yield batch
                num_tombstones += quarantine.collect(stream)["data/tombstones"]

    result = evaluate(
        model,
        batches(),
        forward=forward,
        weights=config.objective.weights_at(step * config.batch_size),
        num_images=config.monitor.num_images,
        runtime=runtime,
    )
    result.metrics["tombstones"] = num_tombstones
    return result


@dataclass(frozen=True)
class HeldOut:
    """How a running training evaluates itself: its parts, and the monitor that it reports to."""

    config: TrainConfig
    forward: Forward
    strategy: Strategy
    indexes: Sequence[Index]
    runtime: Runtime
    quarantine: Quarantine
    monitor: Monitor

    def report(self, step: int, before_batch: Callable[[], None]) -> dict[str, float]:
        """Evaluate the weights, and the averaged ones beside them; a collective.

        Returns the metrics as they are logged. before_batch: see `evaluate_split`.
        """
        views: dict[str, AbstractContextManager[None]] = {"eval": nullcontext()}
        if self.config.ema_decay is not None:
            views["eval_ema"] = self.strategy.averaged()
        metrics: dict[str, float] = {}
        for name, view in views.items():
            with view:
                result = evaluate_split(
                    self.strategy.model,
                    self.config,
                    step=step,
                    forward=self.forward,
                    indexes=self.indexes,
                    runtime=self.runtime,
                    quarantine=self.quarantine,
                    before_batch=before_batch,
                )
            metrics |= {f"{name}/{key}": value for key, value in result.metrics.items()}
            if result.pictures is not None:
                self.monitor.picture(step, name, result.pictures)
        self.monitor.log(step, metrics)
        return metrics


def evaluate_run(
    run_dir: Path, *, step: Step | None = None, split: str | None = None
) -> dict[str, float]:
    """Evaluate a checkpoint of a run: the metrics that training logged, by the same names.

    step: None takes the newest checkpoint that verifies. split: None takes the config's held-out
    split. Raises UserError if there is no such run, checkpoint or split.
    """
    config = load_config(run_dir)
    if split is not None:
        evaluation = config.evaluation.model_copy(update={"split": split})
        config = config.model_copy(update={"evaluation": evaluation})
    runtime = Runtime.start(accumulation=1)
    check_ranks(config, runtime)
    indexes = open_indexes(config.data)
    quarantine = Quarantine(run_dir, config.data, runtime)
    forward = make_forward(config, runtime.device)
    metrics: dict[str, float] = {}
    names: dict[str, Literal["raw", "ema"]] = {"eval": "raw"}
    if config.ema_decay is not None:
        names["eval_ema"] = "ema"
    # Chosen once: a training may save and remove checkpoints meanwhile.
    chosen: int | None = None
    with runtime.together():
        if runtime.is_main:
            chosen = read_state(choose_checkpoint(run_dir, step)).step
    chosen = runtime.from_main(chosen)
    for name, weights in names.items():
        run = load_run(run_dir, step=chosen, weights=weights)
        result = evaluate_split(
            place_model(run.model, config, runtime.device),
            config,
            step=run.step,
            forward=forward,
            indexes=indexes,
            runtime=runtime,
            quarantine=quarantine,
        )
        metrics["step"] = run.step
        metrics |= {f"{name}/{key}": value for key, value in result.metrics.items()}
    return metrics
