"""Held-out losses and metrics: every sample of a split once, on any number of processes.

Corruption and posterior noise depend on the sample only, so two evaluations differ only by the
weights. Likelihoods use one noise sample per image; the squared error uses the posterior's mean.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.common import rng
from pipeline.common.console import warn
from pipeline.common.precision import autocast
from pipeline.data.stream import Batch
from pipeline.distributed.gather import RowGather
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.gallery import Gallery
from pipeline.losses.terms import Networks
from pipeline.metrics import EvaluatedBatch, MetricBase
from pipeline.models.autoencoder import ModelOutput
from pipeline.monitoring.meter import Meter
from pipeline.monitoring.sheets import Sheet
from pipeline.training.forward import Forward

_warn_once = cache(warn)  # every evaluation of a training would repeat it


class Measurement:
    """The evaluation of one model: add its micro-batches, then take the result."""

    def __init__(
        self,
        forward: Forward,
        metrics: Sequence[MetricBase],
        *,
        weights: Mapping[str, float],
        networks: Networks | None = None,
        gallery: Gallery | None = None,
    ) -> None:
        """weights: of the objective's terms in `loss`. networks: of the metrics, by `networks_of`.

        gallery: collects what is to be shown.
        """
        self._forward, self._networks = forward, networks or {}
        self._weights = weights
        self.gallery = gallery
        self._losses = Meter(forward.device)
        self._sums_of = [MetricSums(metric) for metric in metrics]
        self._sigma2: Tensor | None = None
        self._kept: object = None  # tensors of the last micro-batch; see `training.step.train_step`

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Batch) -> None:
        """Evaluate `model`, in evaluation mode, on one micro-batch."""
        forward = self._forward
        inputs = forward.inputs(batch, "evaluation")
        output, losses = forward.run(model, inputs, weights=self._weights)
        assert output.decoded is not None
        mean = _reconstruction(model, output, forward)
        values = {"loss": losses.total, "distortion": losses.distortion, **losses.terms}
        self._losses.add(values, inputs.weight)
        self._sigma2 = forward.likelihood.sigma2(output.learned)

        def run_model(*arguments: Tensor, **settings: object) -> ModelOutput:
            with autocast(forward.precision, forward.device):
                return model(*arguments, **settings)

        seen = EvaluatedBatch(
            uid=batch.uid.to(forward.device),
            weight=inputs.weight,
            clean=inputs.clean,
            corrupted=inputs.corrupted,
            mean=mean,
            sample=forward.likelihood.mean(output.decoded),
            output=output,
            losses=losses,
            likelihood=forward.likelihood,
            model=run_model,
            networks=self._networks,
            value_bits=16 if forward.decode.stored_dtype == np.uint16 else 8,
        )
        figures: dict[str, Tensor] = {}
        for sums in self._sums_of:
            figures |= sums.add(seen)
        if self.gallery is not None:
            self.gallery.add(seen, figures)
        self._kept = seen

    def result(self, runtime: Runtime) -> dict[str, float]:
        """Return the metrics over all processes, and `samples`; a collective."""
        metrics, num_samples = self._losses.reduce(runtime)
        for sums in self._sums_of:
            metrics |= sums.value(runtime)
        metrics = {**dict(sorted(metrics.items())), "samples": num_samples}
        if self._sigma2 is not None:
            metrics["sigma2"] = float(self._sigma2)
        return metrics

    def sheet(self, runtime: Runtime) -> Sheet:
        """Return what is to be shown, after `result`: on the main process; a collective."""
        sheet = Sheet({}) if self.gallery is None else self.gallery.sheet(runtime)
        vectors = {n: vector for sums in self._sums_of for n, vector in sums.vectors.items()}
        if vectors and runtime.is_main:
            sheet = Sheet(sheet.pictures, {**sheet.contents, "vectors": vectors})
        return sheet


def networks_of(metrics: Sequence[MetricBase], device: torch.device) -> Networks:
    """Build the networks of all metrics, each once, frozen; raises UserError."""
    builders = {name: make for metric in metrics for name, make in metric.networks().items()}
    return {name: make().to(device).eval().requires_grad_(False) for name, make in builders.items()}


class MetricSums:
    """Sums and rows of one metric, over this process's part of a split."""

    def __init__(self, metric: MetricBase, seed: int = 0) -> None:
        """seed: chooses the images whose rows are kept, if there are more than `max_rows`.

        It is not the run's: two runs on the same data are compared by the same images.
        """
        self._metric, self._seed = metric, seed
        self._totals: dict[str, Tensor] = {}  # of values per image; "": their number
        self._sums: dict[str, Tensor] = {}
        self.vectors: dict[str, list[float]] = {}  # see `MetricBase.vectors`; after `value`
        # uid and row of the images with the smallest random draws.
        self._kept: list[Tensor] = []

    def add(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        """Add a micro-batch; return the metric's values [B] per image."""
        per_image = self._metric.per_image(batch)
        if per_image:
            images = batch.weight.sum(dtype=torch.float64)
            totals = {name: batch.total(values) for name, values in per_image.items()}
            _add(self._totals, {**totals, "": images})
        _add(self._sums, self._metric.sums(batch))
        rows = self._metric.rows(batch)
        if rows is not None:
            counted = batch.weight > 0
            uid, rows = batch.uid[counted], rows[counted]
            kept = [uid, rows]
            if self._kept:
                kept = [torch.cat(pair) for pair in zip(self._kept, kept, strict=True)]
            self._kept = self._chosen(*kept)
        return per_image

    def value(self, runtime: Runtime) -> dict[str, float]:
        """Return the metric's values over all processes; a collective."""
        totals, sums = (_over_processes(it, runtime) for it in (self._totals, self._sums))
        means = {name: float(total / totals[""]) for name, total in totals.items() if name}
        rows = None
        if self._kept:
            uid, rows = self._kept
            [chosen] = self._chosen(gather_rows(uid))
            mine = torch.isin(uid, chosen)
            uid, rows = gather_rows(uid[mine]), gather_rows(rows[mine])
            rows = rows[uid.argsort()]
        self.vectors = self._metric.vectors(sums)
        for remark in self._metric.remarks(sums) if runtime.is_main else ():
            _warn_once(remark)
        return means | self._metric.value(sums, rows)

    def _chosen(self, uid: Tensor, *columns: Tensor) -> list[Tensor]:
        """Keep the images with the smallest draws: the same for any number of processes."""
        zero = torch.zeros_like(uid)
        draws = rng.sample_keys(self._seed, "evaluation/rows", epoch=zero, uid=uid)
        chosen = draws.argsort()[: self._metric.max_rows]
        return [column[chosen] for column in (uid, *columns)]


def _add(totals: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to their totals, in float64."""
    for name, value in values.items():
        if name in totals:
            totals[name] += value  # in place: a matrix of a metric may be large
        else:
            totals[name] = value.to(torch.float64, copy=True)


def _over_processes(values: Mapping[str, Tensor], runtime: Runtime) -> dict[str, Tensor]:
    """Return the sums over all processes; a collective unless there are no values."""
    if not values:
        return {}
    packed = torch.cat([value.flatten() for value in values.values()])
    parts = runtime.sum(packed).split([value.numel() for value in values.values()])
    return {name: part.view(values[name].shape) for name, part in zip(values, parts, strict=True)}


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, which may differ in number; a collective."""
    gather = RowGather()
    lengths = gather(torch.tensor([len(rows)], device=rows.device))
    size = int(lengths.max())
    padding = rows.new_zeros(size - len(rows), *rows.shape[1:])
    is_row = torch.arange(size, device=rows.device) < lengths[:, None]
    return gather(torch.cat([rows, padding]))[is_row.flatten()]


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put the model into evaluation mode inside the context, and back after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _reconstruction(model: nn.Module, output: ModelOutput, forward: Forward) -> Tensor:
    """Decode the posterior's mean [B, *event]; without a posterior, the code itself."""
    assert output.decoded is not None
    if output.posterior is None or output.posterior.logvar is None:
        return forward.likelihood.mean(output.decoded)
    with autocast(forward.precision, forward.device):
        decoded: ModelOutput = model(output.posterior.mu, mode="decode")
    assert decoded.decoded is not None
    return forward.likelihood.mean(decoded.decoded)
