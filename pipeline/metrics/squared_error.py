"""How far reconstructions are from the images."""

from typing import Literal

from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch, MeanMetric


class SquaredErrorMetric(MeanMetric):
    """Sum over the elements of an image of (x - mean)^2, x in [0, 1]."""

    kind: Literal["squared_error"] = "squared_error"

    def per_image(self, seen: EvaluatedBatch) -> dict[str, Tensor]:
        """Return the error of the reconstruction from the posterior's mean."""
        return {"squared_error": (seen.clean - seen.mean).square().flatten(1).sum(1)}
