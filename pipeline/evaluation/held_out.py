"""Held-out evaluation of a run, while it trains and, by `latentmill evaluate RUN`, afterwards.

held-out split of every data set, in turn --each view: raw weights, averaged weights--> metrics
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from pipeline.checkpoints.folder import Weights, read_state
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.order.mixture import Mixture
from pipeline.data.settings import DataConfig
from pipeline.data.stream import open_stream
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.datasets import open_indexes, order_of
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.evaluation.reconstruction import evaluate
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.monitor import Monitor
from pipeline.training.build import check_data, make_forward, place_model
from pipeline.training.forward import Forward
from pipeline.training.loading import Step, choose_checkpoint, load_config, load_run
from pipeline.training.run_directory import check_ranks

# Metric prefix -> what gives the model with those weights, for as long as the context lasts.
Views = Mapping[str, Callable[[], AbstractContextManager[nn.Module]]]
PREFIXES: dict[str, Weights] = {"eval": "raw", "eval_ema": "ema"}


@dataclass(frozen=True)
class HeldOutSplit:
    """What an evaluation reads of one data set: every sample once, not augmented."""

    data: DataConfig
    index: Index
    order: Mixture
    states: States


def held_out_splits(
    config: TrainConfig, indexes: Sequence[Index], states: Sequence[States]
) -> list[HeldOutSplit]:
    """Return the held-out splits that hold samples; once per start. states: see `check_data`."""
    splits: list[HeldOutSplit] = []
    for source, index, seen in zip(config.data.sources, indexes, states, strict=True):
        held_out = {"split": config.evaluation.split, "augmentations": ()}
        single = {"path": source.path, "shards": source.shards, "mixture": ()}
        data = config.data.model_copy(update=held_out | single)
        if index.counts(data.split).any():
            order = order_of(data, [index], config.seed, config.batch_size, "mask")
            splits.append(HeldOutSplit(data, index, order, seen))
    return splits


@dataclass(frozen=True)
class HeldOut:
    """How a run is evaluated: on what, by which losses, on which processes."""

    config: TrainConfig
    splits: Sequence[HeldOutSplit]
    forward: Forward
    runtime: Runtime
    quarantine: Quarantine  # takes samples that could not be used

    def evaluate(
        self,
        views: Views,
        step: int,
        *,
        monitor: Monitor | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Evaluate every view, with the regularisers' weights of `step`; a collective.

        Returns the metrics, as they are logged, and shows them on the monitor. before_batch: may
        raise, on all processes together.
        """
        metrics: dict[str, float] = {}
        for prefix, view in views.items():
            num_tombstones = [0.0]
            with view() as model:
                result = evaluate(
                    model,
                    self._batches(before_batch, num_tombstones),
                    forward=self.forward,
                    weights=self.config.objective.weights_at(step * self.config.batch_size),
                    num_images=self.config.monitor.num_images,
                    runtime=self.runtime,
                )
            result.metrics["tombstones"] = sum(num_tombstones)
            metrics |= {f"{prefix}/{name}": value for name, value in result.metrics.items()}
            if monitor is not None and result.pictures is not None:
                monitor.picture(step, prefix, result.pictures)
        if monitor is not None:
            monitor.log(step, metrics)
        return metrics

    def _batches(
        self, before_batch: Callable[[], None], num_tombstones: list[float]
    ) -> Iterator[Batch]:
        """Yield the batches of every split in turn; append its tombstones."""
        runtime = self.runtime
        for split in self.splits:
            with open_stream(
                split.data,
                [split.index],
                split.order,
                [split.states],
                rank=runtime.rank,
                world=runtime.world,
                device=runtime.device,
            ) as stream:
                for batch in DeviceBatches(stream, runtime.device):
                    before_batch()
                    yield batch
                num_tombstones.append(self.quarantine.collect(stream)["data/tombstones"])


def views_of(strategy: Strategy, config: TrainConfig) -> Views:
    """Return the weights of a running training, and the averaged ones beside them."""

    @contextmanager
    def averaged() -> Generator[nn.Module]:
        with strategy.averaged():
            yield strategy.model

    raw: Views = {"eval": lambda: nullcontext(strategy.model)}
    return raw if config.ema_decay is None else {**raw, "eval_ema": averaged}


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
    held_out = HeldOut(
        config,
        held_out_splits(config, indexes, check_data(config, indexes)),
        make_forward(config, runtime.device),
        runtime,
        Quarantine(run_dir, config.data, runtime),
    )
    kept = [prefix for prefix in PREFIXES if prefix == "eval" or config.ema_decay is not None]
    # Chosen once: a training may save and remove checkpoints meanwhile.
    chosen: int | None = None
    with runtime.together():
        if runtime.is_main:
            path = choose_checkpoint(run_dir, config, step, PREFIXES[kept[-1]])
            chosen = read_state(path).step
    chosen = runtime.from_main(chosen)
    assert chosen is not None

    def load(weights: Weights) -> AbstractContextManager[nn.Module]:
        run = load_run(run_dir, step=chosen, weights=weights, config=config)
        return nullcontext(place_model(run.model, config, runtime.device))

    views: Views = {prefix: partial(load, PREFIXES[prefix]) for prefix in kept}
    return {"step": chosen, **held_out.evaluate(views, chosen)}
