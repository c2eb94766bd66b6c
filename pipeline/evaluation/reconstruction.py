"""Held-out losses and pictures: every sample of a split once, on any number of processes.

Corruption and posterior noise depend on the sample only, so two evaluations differ only by the
weights. Likelihoods use one noise sample per image; the squared error uses the posterior's mean.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common import rng
from pipeline.common.precision import autocast
from pipeline.data.decode import Decode, ImageDecode
from pipeline.data.stream import Batch
from pipeline.distributed.gather import RowGather
from pipeline.distributed.runtime import Runtime
from pipeline.losses.terms import Networks
from pipeline.metrics import EvaluatedBatch, MetricBase
from pipeline.models.autoencoder import ModelOutput
from pipeline.monitoring.meter import Meter
from pipeline.training.forward import Forward, Inputs


class Measurement:
    """The evaluation of one model: add its micro-batches, then take the result."""

    def __init__(
        self,
        forward: Forward,
        metrics: Sequence[MetricBase],
        *,
        weights: Mapping[str, float],
        num_images: int,
        show: Callable[[NDArray[np.uint8]], None],
    ) -> None:
        """weights: of the objective's terms in `loss`.

        show: called with the picture of the first `num_images` samples [num_images * H, 4 * W, 3]
        as soon as it is complete; not for data that are not images.
        """
        self._forward = forward
        self._networks: Networks = {
            name: make().to(forward.device).eval().requires_grad_(False)
            for name, make in {n: m for it in metrics for n, m in it.networks().items()}.items()
        }
        self._weights = weights
        self._num_images, self._show = num_images, show
        self._losses = Meter(forward.device)
        self._sums_of = [MetricSums(metric, forward.seed) for metric in metrics]
        self._sigma2: Tensor | None = None
        self._pictures: list[NDArray[np.uint8]] = []
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
        for sums in self._sums_of:
            sums.add(seen)
        self._kept = seen
        missing = self._num_images - sum(map(len, self._pictures))
        shown = picture_rows(inputs, mean, missing, forward.decode) if missing > 0 else None
        if shown is not None:
            self._pictures.append(shown)
            if len(shown) == missing:
                self._show(picture_grid(self._pictures))

    def result(self, runtime: Runtime) -> dict[str, float]:
        """Return the metrics over all processes, and `samples`; a collective."""
        metrics, num_samples = self._losses.reduce(runtime)
        for sums in self._sums_of:
            metrics |= sums.value(runtime)
        metrics = {**dict(sorted(metrics.items())), "samples": num_samples}
        if self._sigma2 is not None:
            metrics["sigma2"] = float(self._sigma2)
        if 0 < sum(map(len, self._pictures)) < self._num_images:  # a split with few samples
            self._show(picture_grid(self._pictures))
        return metrics


class MetricSums:
    """Sums and rows of one metric, over this process's part of a split."""

    def __init__(self, metric: MetricBase, seed: int) -> None:
        """seed: chooses the images whose rows are kept, if there are more than `max_rows`."""
        self._metric, self._seed = metric, seed
        self._sums: dict[str, Tensor] = {}
        # uid and row of the images with the smallest random draws.
        self._kept: list[Tensor] = []

    def add(self, batch: EvaluatedBatch) -> None:
        """Add a micro-batch."""
        for name, value in self._metric.sums(batch).items():
            value = value.to(torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        rows = self._metric.rows(batch)
        if rows is not None:
            counted = batch.weight > 0
            uid, rows = batch.uid[counted], rows[counted]
            kept = [uid, rows]
            if self._kept:
                kept = [torch.cat(pair) for pair in zip(self._kept, kept, strict=True)]
            self._kept = self._chosen(*kept)

    def value(self, runtime: Runtime) -> dict[str, float]:
        """Return the metric's values over all processes; a collective."""
        shapes = {name: value.shape for name, value in self._sums.items()}
        if shapes:
            packed = torch.cat([value.flatten() for value in self._sums.values()])
            parts = runtime.sum(packed).split([shape.numel() for shape in shapes.values()])
            sums = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        else:
            sums = {}
        rows = None
        if self._kept:
            uid, rows = self._kept
            [chosen] = self._chosen(gather_rows(uid))
            mine = torch.isin(uid, chosen)
            uid, rows = gather_rows(uid[mine]), gather_rows(rows[mine])
            rows = rows[uid.argsort()]
        return self._metric.value(sums, rows)

    def _chosen(self, uid: Tensor, *columns: Tensor) -> list[Tensor]:
        """Keep the images with the smallest draws: the same for any number of processes."""
        zero = torch.zeros_like(uid)
        draws = rng.sample_keys(self._seed, "evaluation/rows", epoch=zero, uid=uid)
        chosen = draws.argsort()[: self._metric.max_rows]
        return [column[chosen] for column in (uid, *columns)]


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


def picture_rows(
    inputs: Inputs, mean: Tensor, num_images: int, decode: Decode
) -> NDArray[np.uint8] | None:
    """Return clean | corrupted | reconstruction | absolute error of images, [n, H, 4W, C] bytes.

    Alpha is shown as a plain background behind the colours, and its error in each of theirs, where
    it is larger. None for data that are no images.
    """
    background = decode.background if isinstance(decode, ImageDecode) else 0
    has_alpha = isinstance(decode, ImageDecode) and decode.channels == 4
    if not has_alpha and (inputs.clean.ndim != 4 or inputs.clean.shape[1] not in (1, 3)):
        return None
    shown = (inputs.weight > 0).nonzero()[:num_images, 0]
    columns = [column[shown].float() for column in (inputs.clean, inputs.corrupted, mean)]
    error = (columns[0] - columns[2]).abs()
    if has_alpha:
        level = background / 255
        parts = [(column[:, :3], column[:, 3:].clamp(0, 1)) for column in columns]
        columns = [colour * alpha + level * (1 - alpha) for colour, alpha in parts]
        error = torch.maximum(error[:, :3], error[:, 3:])
    grid = torch.cat([*columns, error], dim=3)  # [n, C, H, 4W]
    return grid.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(rows: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the rows below each other, as RGB."""
    picture = np.concatenate([row for part in rows for row in part])
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
