"""The ratio of the peak of the signal to the noise, in decibels."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch, MeanMetric
from pipeline.metrics.images import ImageMetric

MAX_DB = 100.0  # stands for equal pictures, whose ratio is infinite


def decibels(mean_squared_error: Tensor) -> Tensor:
    """Return 10 log10(1 / MSE), at most 100 dB; values in [0, 1]."""
    return mean_squared_error.log10().mul(-10).clamp(max=MAX_DB)


class Psnr(ImageMetric, MeanMetric):
    """psnr: the mean over the images of each image's PSNR. psnr_pooled: of the mean squared error.

    In dB, at most 100 dB for an image and for the whole. Both pictures as a PNG of 8 bits holds
    them. psnr >= psnr_pooled (Jensen): papers print either.
    """

    kind: Literal["psnr"] = "psnr"
    higher_is_better: ClassVar[bool] = True

    def per_image(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        return {self.label: decibels(self._mean_squared_error(batch))}

    def sums(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        total = batch.total(self._mean_squared_error(batch))
        return {"images": batch.weight.sum(dtype=torch.float64), "mean_squared_error": total}

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        del rows
        pooled = decibels(sums["mean_squared_error"] / sums["images"])
        return {self.named("psnr_pooled"): float(pooled)}

    def _mean_squared_error(self, batch: EvaluatedBatch) -> Tensor:
        clean, decoded = self.levels(batch)
        return (clean - decoded).square().flatten(1).mean(1, dtype=torch.float64) / 255**2
