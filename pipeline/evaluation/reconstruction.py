"""Held-out losses and pictures: every sample of a split once, the same on any number of processes.

Corruption and posterior noise are keyed by sample alone, so two evaluations differ by the weights
only. Likelihoods use one noise sample per image; the squared error uses the posterior's mean.
"""

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common.precision import autocast
from pipeline.data.stream import Batch
from pipeline.distributed.runtime import Runtime
from pipeline.losses.objective import Losses, bits_per_dimension, negative_elbo
from pipeline.losses.terms import gaussian_kl
from pipeline.models.autoencoder import Output
from pipeline.monitoring.meter import Meter
from pipeline.training.forward import Forward, Inputs


@dataclass(frozen=True)
class Evaluation:
    """Means over a split and pictures of its first samples."""

    metrics: dict[str, float]  # names as in `metrics`, plus `samples`
    pictures: NDArray[np.uint8] | None  # [num_images * H, 4 * W, 3]; None: events are no images


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward,
    weights: tuple[float, ...],
    num_images: int,
    runtime: Runtime,
) -> Evaluation:
    """Evaluate `model` as it stands on this process's part of a split; a collective.

    weights: the regularisers' weights in `loss`. num_images: rows of the picture.
    """
    meter = Meter(runtime.device)
    pictures: NDArray[np.uint8] | None = None
    learned_sigma2: Tensor | None = None
    with _evaluating(model):
        for batch in batches:
            inputs = forward.inputs(batch, "evaluation")
            output, losses = forward.run(model, inputs, weights=weights)
            mean = _reconstruction(model, output, forward)
            meter.add(evaluation_values(output, losses, inputs, mean, forward), inputs.weight)
            learned_sigma2 = forward.likelihood.sigma2(output.learned)
            if pictures is None and num_images:
                pictures = picture_grid(inputs, mean, num_images)
    metrics, num_samples = meter.reduce(runtime)
    metrics["samples"] = num_samples
    if "nats" in metrics and forward.likelihood.is_density:
        num_elements = math.prod(forward.decode.event_shape)
        metrics["bits_per_dimension"] = bits_per_dimension(metrics["nats"], num_elements)
    if learned_sigma2 is not None:
        metrics["sigma2"] = float(learned_sigma2)
    return Evaluation(metrics, pictures)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Put the model into evaluation mode, and back, however the evaluation ends."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _reconstruction(model: nn.Module, output: Output, forward: Forward) -> Tensor:
    """Decode the posterior's mean [B, *event]."""
    assert output.posterior is not None
    assert output.decoded is not None
    if output.posterior.logvar is None:
        return forward.likelihood.mean(output.decoded)
    with autocast(forward.precision, forward.device):
        decoded: Output = model(output.posterior.mu, mode="decode")
    assert decoded.decoded is not None
    return forward.likelihood.mean(decoded.decoded)


def evaluation_values(
    output: Output, losses: Losses, inputs: Inputs, mean: Tensor, forward: Forward
) -> dict[str, Tensor]:
    """Return the values per image [B] that an evaluation averages."""
    values = {"loss": losses.total, "distortion": losses.distortion, **losses.regularisers}
    values["squared_error"] = (inputs.clean - mean).square().flatten(1).sum(1)
    posterior = output.posterior
    if posterior is not None and posterior.logvar is not None:
        values["kl"] = gaussian_kl(posterior).flatten(1).sum(1)
        if forward.likelihood.is_nats:
            values["nats"] = negative_elbo(losses, posterior)
    return values


def picture_grid(inputs: Inputs, mean: Tensor, num_images: int) -> NDArray[np.uint8] | None:
    """Return rows of clean | corrupted | reconstruction | absolute error, RGB bytes."""
    if inputs.clean.ndim != 4 or inputs.clean.shape[1] not in (1, 3):
        return None
    columns = (inputs.clean, inputs.corrupted, mean, (inputs.clean - mean).abs())
    grid = torch.cat([column[:num_images].float() for column in columns], dim=3)  # [n, C, H, 4W]
    rows = grid.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    picture = rows.reshape(-1, *rows.shape[2:])
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
