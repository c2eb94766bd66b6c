"""A metric that is no mean: the trace and the largest entry of the latents' covariance."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch, MetricBase


class Covariance(MetricBase):
    """Of the posterior's means."""

    kind: Literal["covariance"] = "covariance"

    def sums(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        assert batch.output.posterior is not None
        mu = batch.output.posterior.mu.flatten(1).double()
        squares = batch.total(mu[:, :, None] * mu[:, None, :])
        return {"images": batch.weight.sum(), "mu": batch.total(mu), "squares": squares}

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        del rows
        mean = sums["mu"] / sums["images"]
        covariance = sums["squares"] / sums["images"] - mean[:, None] * mean
        return {
            "covariance_trace": float(covariance.trace()),
            "covariance_max": float(covariance.max()),
        }
