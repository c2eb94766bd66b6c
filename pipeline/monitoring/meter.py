"""Metrics of a training, summed on the device: means over all images, ranks and micro-batches.

Names and units (prefix `train/`, `eval/` or `eval_ema/`):
    loss               the objective, per image
    distortion         its likelihood term with emphasis, per image (nats, or squared error)
    squared_error      sum over the elements of an image of (x - mean)^2, x in [0, 1]
    kl                 KL(q(z|x) || N(0, I)) in nats per image
    nats               bound on -ln p(x) per image (likelihoods in nats only)
    bits_per_dimension the same per element of 8-bit data, of uint16: 16-bit (densities only)
    sigma2             variance of an element given z (Gaussian likelihood only)
    others             see the files of `pipeline/metrics`
and, without these prefixes:
    optim/learning_rate, optim/grad_norm (before clipping, mean over applied steps),
    optim/grad_norm_discriminator (the discriminator's part, with an adversarial term),
    optim/skipped_steps (since this start), optim/weight_kl (beta),
    perf/images_per_second, perf/data_wait_fraction (share of time in the stream's next()),
    perf/device_memory_peak_bytes or, on a CPU, perf/process_memory_peak_bytes: see `memory`,
    data/samples_seen, data/epoch, data/images and data/tombstones (since this start)
"""

import math
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.data.stream import Stream
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import StepResult
from pipeline.losses.objective import Losses
from pipeline.monitoring.memory import read_peak


class Meter:
    """Weighted sums of per-image values since the last `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add values [B] (each name in every call) of images with weight [B]; no host sync."""
        # The value of a tombstone may be infinite: 0 * inf must not get into the sum.
        counted = weight > 0
        for name, value in values.items():
            weighted = (value.detach() * weight).where(counted, 0.0).sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._weight = self._weight + weight.sum(dtype=torch.float64)

    def reduce(self, runtime: Runtime) -> tuple[dict[str, float], float]:
        """Return the means over all ranks and the total weight, and reset; a collective.

        The only host sync.
        """
        names = sorted(self._sums)
        packed = torch.stack([self._weight, *(self._sums[name] for name in names)])
        total, *sums = runtime.sum(packed).tolist()
        self._sums.clear()
        self._weight = torch.zeros_like(self._weight)
        # Without a usable sample the mean is NaN.
        means = [value / total if total else math.nan for value in sums]
        return dict(zip(names, means, strict=True)), total


class TrainingMeter:
    """Losses, gradient norms, speed and memory of a training, since the last log."""

    def __init__(self, runtime: Runtime, stream: Stream) -> None:
        self._runtime = runtime
        self._stream = stream
        self._losses = Meter(runtime.device)
        self._norm_sum = torch.zeros((), device=runtime.device)
        self._discriminator_norm_sum: Tensor | None = None
        self._applied = torch.zeros((), device=runtime.device)
        self._num_steps = 0
        self._num_skipped = 0
        self._start = time.monotonic()
        self._stall_start = stream.counters.stall_seconds

    def add(self, losses: Losses, weight: Tensor) -> None:
        """Add a micro-batch."""
        values = {"loss": losses.total, "distortion": losses.distortion}
        self._losses.add(values | losses.terms | {"squared_error": losses.squared_error}, weight)

    def add_step(self, result: StepResult) -> None:
        """Add an optimizer step."""
        applied = result.applied
        self._norm_sum = self._norm_sum + result.grad_norm.where(applied > 0, 0.0).float()
        if (norm := result.discriminator_norm) is not None:
            norm = norm.where(applied > 0, 0.0).float()
            former = self._discriminator_norm_sum
            self._discriminator_norm_sum = norm if former is None else former + norm
        self._applied = self._applied + applied
        self._num_steps += 1

    @contextmanager
    def paused(self) -> Generator[None]:
        """Exclude the time spent inside (an evaluation, a save) from the rates."""
        started, stalled = time.monotonic(), self._stream.counters.stall_seconds
        try:
            yield
        finally:
            self._start += time.monotonic() - started
            self._stall_start += self._stream.counters.stall_seconds - stalled

    def read(self) -> dict[str, float]:
        """Return the values since the last call, and reset; a collective, the only host sync."""
        means, num_images = self._losses.reduce(self._runtime)
        applied, norm_sum = self._applied.item(), self._norm_sum.item()
        seconds = time.monotonic() - self._start
        stalled = self._stream.counters.stall_seconds - self._stall_start
        stalled = self._runtime.sum(torch.tensor(stalled, device=self._runtime.device)).item()
        values = {f"train/{name}": value for name, value in means.items()}
        values["optim/grad_norm"] = norm_sum / applied if applied else math.nan
        if self._discriminator_norm_sum is not None:
            norm_sum = self._discriminator_norm_sum.item()
            values["optim/grad_norm_discriminator"] = norm_sum / applied if applied else math.nan
            self._discriminator_norm_sum = None
        self._num_skipped += self._num_steps - int(applied)
        values["optim/skipped_steps"] = self._num_skipped
        values["perf/images_per_second"] = num_images / seconds
        values["perf/data_wait_fraction"] = stalled / (seconds * self._runtime.world)
        values |= read_peak(self._runtime)
        self._norm_sum = torch.zeros_like(self._norm_sum)
        self._applied = torch.zeros_like(self._applied)
        self._num_steps = 0
        self._start = time.monotonic()
        self._stall_start = self._stream.counters.stall_seconds
        return values
