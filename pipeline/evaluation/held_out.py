"""Held-out evaluation: during a training, and of a trained model.

split of each data set --each view: raw weights, averaged weights--> metrics of the data set
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from pipeline.checkpoints.folder import Weights
from pipeline.common.console import warn
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.stream import Stream, open_stream
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.evaluation.gallery import Gallery
from pipeline.evaluation.reconstruction import Measurement, evaluating, networks_of
from pipeline.evaluation.splits import HeldOutSplit
from pipeline.losses.terms import Networks
from pipeline.metrics import ranking_of
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.sheets import Sheet
from pipeline.training.forward import Forward

# Metric prefix -> context in which the model has those weights.
Views = Mapping[str, Callable[[], AbstractContextManager[nn.Module]]]
Show = Callable[[int, str, Sheet], object]  # of a step, under a name
CHUNK_BYTES = 256 << 20  # per process
PREFIXES: dict[str, Weights] = {"eval": "raw", "eval_ema": "ema"}


@dataclass(frozen=True)
class HeldOut:
    """Evaluates a run on its held-out splits; those of one name are measured together."""

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
        show: Show | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Evaluate every view, with the regularisers' weights of `step`; a collective.

        Returns the metrics by their logged names, and logs them on the monitor: VIEW/METRIC, or
        VIEW/NAME/METRIC of a data set with a name. show: takes what is to be shown of a view, on
        the main process; None: the monitor does. before_batch: may raise, but on all processes.
        Raises UserError if a key to picture is not evaluated.
        """
        if show is None and monitor is not None:
            show = monitor.show
        metrics: dict[str, float] = {}
        galleries: list[Gallery] = []
        sheets: dict[str, Sheet] = {}
        with self.runtime.sharing_errors():
            networks = networks_of(self.config.evaluation.metrics, self.runtime.device)
        for name in dict.fromkeys(split.name for split in self.splits):
            measurements, num_tombstones = self._measure(
                name, views, step, networks, show, before_batch
            )
            for view, measurement in measurements.items():
                prefix = f"{view}/{name}".rstrip("/")
                result = {**measurement.result(self.runtime), "tombstones": num_tombstones}
                metrics |= {f"{prefix}/{figure}": value for figure, value in result.items()}
                if show is not None:
                    sheets[prefix] = measurement.sheet(self.runtime)
                if measurement.gallery is not None:
                    galleries.append(measurement.gallery)
        self._check_pictured(galleries, must_be=monitor is None or step == 0)
        for prefix, sheet in sheets.items() if self.runtime.is_main else ():
            assert show is not None
            show(step, prefix.replace("/", "-"), sheet)
        if monitor is not None:
            monitor.log(step, metrics)
        return metrics

    def _measure(
        self,
        name: str,
        views: Views,
        step: int,
        networks: Networks,
        show: Show | None,
        before_batch: Callable[[], None],
    ) -> tuple[dict[str, Measurement], float]:
        """Return measurements of every view on the splits of one name, and bad samples in them."""
        config, num_tombstones = self.config, 0.0
        splits = [split for split in self.splits if split.name == name]
        measurements = {
            view: Measurement(
                self.forward,
                config.evaluation.metrics,
                weights=config.objective.weights_at(step * config.batch_size),
                networks=networks,
                gallery=self._gallery(splits) if show is not None else None,
            )
            for view in views
        }
        for split in splits:
            with self._stream(split) as stream:
                batches = DeviceBatches(stream, self.runtime.device)
                for chunk in chunks(batches, self.chunk_bytes if len(views) > 1 else 0):
                    for name_of_view, view in views.items():
                        with view() as model, evaluating(model):
                            for batch in chunk:
                                before_batch()
                                for part in batch.split(config.accumulation):
                                    measurements[name_of_view].add(model, part)
                num_tombstones += self.quarantine.collect(stream)["data/tombstones"]
        return measurements, num_tombstones

    def _gallery(self, splits: Sequence[HeldOutSplit]) -> Gallery | None:
        """Return what collects the images to be shown; None: none are wanted."""
        config = self.config
        if config.monitor.num_images == 0:
            return None
        return Gallery(
            config.monitor,
            ranking_of(config.evaluation.metrics, config.monitor.rows_by),
            decode=config.data.decode,
            indexes=[split.index for split in splits],
        )

    def _check_pictured(self, galleries: Sequence[Gallery], *, must_be: bool) -> None:
        """Raise UserError, or only warn, if a key to picture is in none of the galleries."""
        wanted = self.config.monitor.pictured if galleries else ()
        missing = [key for key in wanted if all(key in it.missing for it in galleries)]
        if not missing:
            return
        text = (
            f"monitor.pictured names {', '.join(map(repr, missing))}: no evaluated sample has "
            "this key. A run without monitor.pictured lists some keys in images/eval-STEP.json"
        )
        if must_be:
            raise UserError(f"{text}; evaluation.split says which samples are evaluated.")
        if self.runtime.is_main:
            warn(text)

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
