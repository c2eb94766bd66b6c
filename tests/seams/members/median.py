"""A metric of rows: the median error of some images, each decoded twice."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch, MetricBase


class Median(MetricBase):
    """Of the squared errors of the images that are kept, and the uid of the last one."""

    kind: Literal["median"] = "median"
    images: int = 10

    @property
    def max_rows(self) -> int:
        return self.images

    def rows(self, batch: EvaluatedBatch) -> Tensor:
        assert batch.output.z is not None
        again = batch.model(batch.output.z, mode="decode").decoded
        error = (batch.likelihood.mean(again) - batch.clean).square().flatten(1).sum(1).double()
        return error[:, None]

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        del sums
        assert rows is not None
        return {"median": float(rows.median()), "median_images": float(len(rows))}
