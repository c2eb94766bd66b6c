"""How many nats each dimension of the latent carries."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pipeline.losses.terms import gaussian_kl
from pipeline.metrics.base import EvaluatedBatch
from pipeline.metrics.latents import LatentMetric, posterior_of, total_by_dimension


class KlPerDimension(LatentMetric):
    """KL(q(z_j | x) || N(0, 1)) of each dimension j in nats, mean over the images.

    Of maps by channel, summed over the positions: the sum over j is `kl`. Figures are the largest,
    the median and the smallest value: a chart for each of 512 channels would help nobody. The
    vector of all is in the evaluation's file, beside its pictures.
    """

    kind: Literal["kl_per_dimension"] = "kl_per_dimension"

    def sums(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        kl = total_by_dimension(batch, gaussian_kl(posterior_of(batch)))
        return {"images": batch.weight.sum(dtype=torch.float64), "kl": kl}

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        del rows
        kl = sums["kl"] / sums["images"]
        return {
            "kl_per_dimension_max": float(kl.max()),
            "kl_per_dimension_median": float(kl.quantile(0.5)),
            "kl_per_dimension_min": float(kl.min()),
        }

    def vectors(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        return {"kl_per_dimension": (sums["kl"] / sums["images"]).tolist()}
