"""The kernel distance of two sets of features.

    x_i of images, y_i of their reconstructions, k(a, b) = (a.b / D + 1)^3
      mean over i != j of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j)

Binkowski, Sutherland, Arbel and Gretton 2018, "Demystifying MMD GANs", section 4.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch
from pipeline.metrics.network import FeatureMetric

ROWS_AT_ONCE = 1024  # of a kernel matrix


class KernelDistance(FeatureMetric):
    """kid_NAME_SHA8: the squared maximum mean discrepancy with a cubic kernel, without bias.

    `kid` with NVIDIA's inception-2015-12-05.pt. One estimate from all the images that are kept, not
    a mean over random subsets: it has the same expectation, less variance and no draws. Pairs i = j
    are left out of all three means, since a reconstruction depends on its image; so equal sets have
    the distance 0. Papers often print 1000 times the figure.
    """

    kind: Literal["kid"] = "kid"
    # Whose features are kept and compared; chosen by a key, the same in every run.
    images: int = Field(default=5000, ge=2)

    @property
    def figure_kinds(self) -> tuple[str, str]:
        return "kid", "kid"

    @property
    def max_rows(self) -> int:
        return self.images

    def rows(self, batch: EvaluatedBatch) -> Tensor:
        return torch.stack(self.features(batch), dim=1)

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        del sums
        return {self.label: float("nan") if rows is None else kernel_distance(*rows.unbind(1))}


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Return the distance of features x, y [N, D], N pairs; computed in float64, NaN for N < 2."""
    x, y = x.double(), y.double()
    count, size = x.shape
    total = x.new_zeros(())
    for start in range(0, count, ROWS_AT_ONCE):
        at = slice(start, start + ROWS_AT_ONCE)
        kernel = sum(
            sign * (a[at] @ b.T / size + 1) ** 3
            for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -1), (y, x, -1))
        )
        assert isinstance(kernel, Tensor)
        total += kernel.sum() - kernel.diagonal(start).sum()
    return float(total / (count * (count - 1))) if count > 1 else float("nan")
