"""What metrics of the latents share: sums by dimension of a vector, or by channel of a map."""

import torch
from torch import Tensor

from pipeline.data.decode import Decode
from pipeline.metrics.base import EvaluatedBatch, MetricBase
from pipeline.models.autoencoder import ModelConfig
from pipeline.models.bottlenecks import Posterior


class LatentMetric(MetricBase):
    """A metric of the posterior, by latent dimension: of maps by channel."""

    def check(self, model: ModelConfig, decode: Decode) -> None:
        del decode
        if not model.bottleneck.has_density:
            raise ValueError(
                f"metric {self.kind} needs a density, but model.bottleneck.kind is "
                f"{model.bottleneck.kind}: leave the metric out"
            )


def posterior_of(batch: EvaluatedBatch) -> Posterior:
    """Return the posterior of a model whose bottleneck has a density."""
    assert batch.output.posterior is not None
    return batch.output.posterior


def total_by_dimension(batch: EvaluatedBatch, values: Tensor) -> Tensor:
    """Sum values [B, Z, ...] over images and positions, in float64 [Z]."""
    return batch.total(values.flatten(2).sum(2, dtype=torch.float64) if values.ndim > 2 else values)
