"""How far reconstructions are from the images."""

from typing import Literal

from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch, MeanMetric


class SquaredErrorMetric(MeanMetric):
    """Sum over the elements of an image of (x - mean)^2, x in [0, 1]."""

    kind: Literal["squared_error"] = "squared_error"

    def per_image(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        return {"squared_error": (batch.clean - batch.mean).square().flatten(1).sum(1)}
