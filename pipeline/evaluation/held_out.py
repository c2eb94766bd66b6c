"""Held-out evaluation of a run, during the training and afterwards by `latentmill evaluate RUN`.

held-out split of each data set --each view: raw weights, averaged weights--> metrics
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from pipeline.checkpoints.folder import Weights, read_state
from pipeline.common.console import progress
from pipeline.config import TrainConfig
from pipeline.data.decode.image import Size
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.order.mixture import Mixture
from pipeline.data.settings import DataConfig
from pipeline.data.stream import Stream, open_stream
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.datasets import order_of
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.evaluation.reconstruction import Measurement, evaluating
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.monitor import Monitor
from pipeline.training.build import check_data, make_forward, move_model
from pipeline.training.forward import Forward
from pipeline.training.loading import Step, choose_checkpoint, load_config, load_run
from pipeline.training.locations import find_data
from pipeline.training.resizing import decode_at
from pipeline.training.run_directory import check_ranks

# Metric prefix -> context in which the model has those weights.
Views = Mapping[str, Callable[[], AbstractContextManager[nn.Module]]]
CHUNK_BYTES = 256 << 20  # per process
PREFIXES: dict[str, Weights] = {"eval": "raw", "eval_ema": "ema"}


@dataclass(frozen=True)
class HeldOutSplit:
    """The held-out split of one data set, to be read once and without augmentations."""

    data: DataConfig
    index: Index
    order: Mixture
    states: States


def held_out_splits(
    config: TrainConfig, indexes: Sequence[Index], states: Sequence[States]
) -> list[HeldOutSplit]:
    """Return the held-out splits that have samples. states: see `check_data`."""
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
    """Evaluates a run on its held-out splits."""

    config: TrainConfig
    splits: Sequence[HeldOutSplit]
    forward: Forward
    runtime: Runtime
    quarantine: Quarantine  # lists bad samples
    # Every sample is read once for all views: chunks of this size go through each view in turn.
    chunk_bytes: int = CHUNK_BYTES

    def evaluate(
        self,
        views: Views,
        step: int,
        *,
        monitor: Monitor | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Evaluate every view, with the regularisers' weights of `step`; a collective.

        Returns the metrics by their logged names, and logs them on the monitor. before_batch: may
        raise, but on all processes.
        """
        config, num_tombstones = self.config, 0.0
        measurements = {
            prefix: Measurement(
                self.forward,
                config.evaluation.metrics,
                weights=config.objective.weights_at(step * config.batch_size),
                num_images=config.monitor.num_images if monitor else 0,
                show=partial(monitor.picture, step, prefix) if monitor else lambda _: None,
            )
            for prefix in views
        }
        for split in self.splits:
            with self._stream(split) as stream:
                batches = DeviceBatches(stream, self.runtime.device)
                for chunk in chunks(batches, self.chunk_bytes if len(views) > 1 else 0):
                    for prefix, view in views.items():
                        with view() as model, evaluating(model):
                            for batch in chunk:
                                before_batch()
                                for part in batch.split(config.accumulation):
                                    measurements[prefix].add(model, part)
                num_tombstones += self.quarantine.collect(stream)["data/tombstones"]
        metrics: dict[str, float] = {}
        for prefix, measurement in measurements.items():
            result = {**measurement.result(self.runtime), "tombstones": num_tombstones}
            metrics |= {f"{prefix}/{name}": value for name, value in result.items()}
        if monitor is not None:
            monitor.log(step, metrics)
        return metrics

    def _stream(self, split: HeldOutSplit) -> Stream:
        """Open this process's part of a split."""
        return open_stream(
            split.data,
            [split.index],
            split.order,
            [split.states],
            rank=self.runtime.rank,
            world=self.runtime.world,
            device=self.runtime.device,
        )


def chunks(batches: Iterable[Batch], max_bytes: int) -> Iterator[list[Batch]]:
    """Yield lists of batches, of at most `max_bytes` or of one batch.

    A list of several batches has copies: a stream reuses a batch's memory.
    """
    chunk: list[Batch] = []
    num_bytes = 0
    for batch in batches:
        size = sum(tensor.nbytes for tensor in batch.tensors())
        if chunk and num_bytes + size > max_bytes:
            yield chunk
            chunk, num_bytes = [], 0
        if size >= max_bytes:
            yield [batch]
            continue
        chunk.append(batch.copy())
        num_bytes += size
    if chunk:
        yield chunk


def views_of(strategy: Strategy, config: TrainConfig) -> Views:
    """Return the views of a running training: its weights and, if kept, their average."""

    @contextmanager
    def averaged() -> Generator[nn.Module]:
        with strategy.averaged():
            yield strategy.model

    raw: Views = {"eval": lambda: nullcontext(strategy.model)}
    return raw if config.ema_decay is None else {**raw, "eval_ema": averaged}


def evaluate_run(
    run_dir: Path,
    *,
    step: Step | None = None,
    split: str | None = None,
    size: Size | None = None,
    data: Sequence[str] = (),
    shards: Sequence[str] = (),
) -> dict[str, float]:
    """Evaluate a checkpoint of a run; the metrics have the names that the training logs.

    step: None: the newest checkpoint that verifies. split: None: the config's held-out split. size:
    of the pictures, of a fully convolutional model; None: the training's. data, shards: where the
    data sets of the training, and their shards, lie now; empty: they are looked for, see
    `training.locations`. Raises UserError if there is no such run, checkpoint, data or split, or if
    the model takes no pictures of that size.
    """
    config = load_config(run_dir)
    decode = decode_at(size, config.model, config.data.decode, str(run_dir))
    runtime = Runtime.start(accumulation=1)
    check_ranks(config.batch_size, config.accumulation, runtime.world)
    say = progress if runtime.is_main else lambda _: None
    trained, indexes = find_data(run_dir, config.data, paths=data, shards=shards, say=say)
    # Nothing is augmented; an augmentation of the training need not fit the size.
    trained = trained.model_copy(update={"decode": decode, "augmentations": ()})
    config = config.model_copy(update={"data": trained})
    if split is not None:
        evaluation = config.evaluation.model_copy(update={"split": split})
        config = config.model_copy(update={"evaluation": evaluation})
    held_out = HeldOut(
        config,
        held_out_splits(config, indexes, check_data(config, indexes)),
        make_forward(config, runtime.device),
        runtime,
        Quarantine(run_dir, config.data, runtime),
    )
    kept = [prefix for prefix in PREFIXES if prefix == "eval" or config.ema_decay is not None]
    # Chosen once for both views: a running training may save and remove checkpoints.
    chosen: int | None = None
    with runtime.sharing_errors():
        if runtime.is_main:
            path = choose_checkpoint(run_dir, config, step, PREFIXES[kept[-1]])
            chosen = read_state(path).step
    chosen = runtime.broadcast(chosen)
    assert chosen is not None

    views: Views = {}
    for prefix in kept:
        run = load_run(run_dir, step=chosen, weights=PREFIXES[prefix], config=config)
        model = move_model(run.model, config, runtime.device)
        views[prefix] = partial(nullcontext, model)
    return {"step": chosen, **held_out.evaluate(views, chosen)}
