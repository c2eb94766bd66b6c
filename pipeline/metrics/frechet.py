"""The Frechet distance of two sets of features.

    features of images, of reconstructions --N, sum, outer products--> means m, covariances S
      d = ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)

Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter 2017, "GANs trained by a two time-scale
update rule converge to a local Nash equilibrium", eq. 6; covariances with N - 1.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.metrics.base import EvaluatedBatch
from pipeline.metrics.network import FeatureMetric


class Frechet(FeatureMetric):
    """fd_NAME_SHA8: the distance of the images' features from the reconstructions'.

    `fid` with NVIDIA's inception-2015-12-05.pt alone, as stylegan2-ada-pytorch has it: the network
    itself enlarges the pictures. Biased upwards for few images: compare figures of equal `samples`
    only.
    """

    kind: Literal["frechet"] = "frechet"

    @property
    def figure_kinds(self) -> tuple[str, str]:
        return "fd", "fid"

    def sums(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        # The sums need no centre: with mean m and deviation s they lose (m / s)^2 of 2^-53, but
        # features in float32 have lost m / s of 2^-24 already, which is more up to m / s = 2^29.
        counted = batch.weight > 0
        sums = {"images": counted.sum()}
        for name, features in zip(("clean", "decoded"), self.features(batch), strict=True):
            wide = features[counted].double()
            sums |= {name: wide.sum(0), f"{name}_products": wide.T @ wide}
        return sums

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        del rows
        clean, decoded = (_moments(sums, name) for name in ("clean", "decoded"))
        return {self.label: frechet_distance(*clean, *decoded)}

    def remarks(self, sums: Mapping[str, Tensor]) -> Sequence[str]:
        images, size = int(sums["images"]), len(sums["clean"])
        if images > size:
            return ()
        return (
            f"{self.label} is of {images:,} images, but its features have {size:,} values: the "
            "covariances do not have full rank, and the figure says little. Evaluate more samples "
            "(evaluation.max_samples or --max-samples, or another split), or take kid, which has "
            "no bias for few images",
        )


def _moments(sums: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] of features; NaN for one image."""
    images = sums["images"]
    mean = sums[name] / images
    return mean, (sums[f"{name}_products"] - images * torch.outer(mean, mean)) / (images - 1)


def frechet_distance(
    mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor
) -> float:
    """Return the squared Frechet distance of two normal distributions; NaN if a value is none."""
    total = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace()
    if not total.isfinite():
        return float("nan")
    # (S1 S2)^1/2 has the trace of (R S2 R)^1/2 with R = S1^1/2, which is symmetric.
    values, vectors = torch.linalg.eigh(covariance_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ covariance_2 @ root
    squares = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    return float(total - 2 * squares.sqrt().sum())
