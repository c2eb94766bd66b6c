"""The structural similarity of an image and its reconstruction.

    x, y, x^2, y^2, xy --Gaussian window 11 x 11--> moments of each window --> SSIM --mean--> [B]

Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to
structural similarity", eq. 13 to 16.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.data.decode import Decode, ImageDecode
from pipeline.metrics.base import EvaluatedBatch, MeanMetric
from pipeline.metrics.images import ImageMetric
from pipeline.models.autoencoder import ModelConfig

WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 for values in [0, L = 1]
VALUES_AT_ONCE = 1 << 18  # of the images: their float64 moments fit into a cache


class Ssim(ImageMetric, MeanMetric):
    """The mean over windows, channels and images of SSIM.

    Gaussian window of 11 x 11 pixels, sigma 1.5; K1 0.01, K2 0.03; values in [0, 1] as a PNG of 8
    bits holds them; each channel by itself; only windows that lie inside the image; moments of
    the population. In float64: the variance of a nearly plain window is a small difference.
    """

    kind: Literal["ssim"] = "ssim"
    higher_is_better: ClassVar[bool] = True

    def check(self, model: ModelConfig, decode: Decode) -> None:
        super().check(model, decode)
        if isinstance(decode, ImageDecode) and min(decode.height_and_width) < WINDOW:
            height, width = decode.height_and_width
            raise ValueError(
                f"metric ssim looks at windows of {WINDOW} x {WINDOW} pixels, but pictures have "
                f"{height} x {width} (data.decode.size): leave the metric out"
            )

    def per_image(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        clean, decoded = self.levels(batch)
        at_once = max(VALUES_AT_ONCE // clean[0].numel(), 1)
        parts = zip(clean.split(at_once), decoded.split(at_once), strict=True)
        return {
            self.label: torch.cat(
                [similarity(*(it.double() / 255 for it in part)) for part in parts]
            )
        }


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean SSIM [B] of images x, y [B, C, H, W] in [0, 1], H and W at least 11."""
    mean_x, mean_y, square_x, square_y, product = windowed(torch.stack((x, y, x * x, y * y, x * y)))
    variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).flatten(1).mean(1)


def windowed(x: Tensor) -> Tensor:
    """Return the weighted means of all windows inside [..., H, W]: [..., H - 10, W - 10]."""
    distance = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-0.5 * (distance / SIGMA).square())
    weights = (weights / weights.sum()).tolist()
    for dim in (-2, -1):  # the window is a product: rows, then columns
        size = x.shape[dim] - WINDOW + 1
        result = x.narrow(dim, 0, size) * weights[0]
        for start, weight in enumerate(weights[1:], start=1):
            result.add_(x.narrow(dim, start, size), alpha=weight)
        x = result
    return x
