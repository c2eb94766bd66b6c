"""How many dimensions of the latent the encoder uses."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch
from pipeline.metrics.latents import LatentMetric, posterior_of, total_by_dimension

THRESHOLD = 0.01  # of the variance


class ActiveUnits(LatentMetric):
    """Number of dimensions j with Var_x(mu_j) > 0.01, mu_j the posterior's mean.

    Burda, Grosse and Salakhutdinov 2016, section 5.1. Of maps the channels are counted, and the
    variance is taken over images and positions.
    """

    kind: Literal["active_units"] = "active_units"

    def sums(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        # Float64 without a centre is enough: mean^2 / variance would have to be 1e13 for an error
        # of 0.1 %, and then mu itself, in float32, has lost its variance.
        mu = posterior_of(batch).mu.double()
        values = batch.weight.sum(dtype=torch.float64) * mu[0, 0].numel()
        squares = total_by_dimension(batch, mu.square())
        return {"values": values, "mu": total_by_dimension(batch, mu), "squares": squares}

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        del rows
        mean = sums["mu"] / sums["values"]
        variance = sums["squares"] / sums["values"] - mean.square()
        return {"active_units": float((variance > THRESHOLD).sum())}
