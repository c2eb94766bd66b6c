"""What a held-out evaluation measures besides the objective itself.

Add a kind: one file with a `MetricBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.metrics.active_units import ActiveUnits
from pipeline.metrics.base import EvaluatedBatch, MeanMetric, MetricBase
from pipeline.metrics.frechet import Frechet
from pipeline.metrics.kid import KernelDistance
from pipeline.metrics.kl_per_dimension import KlPerDimension
from pipeline.metrics.likelihood import LogLikelihood
from pipeline.metrics.lpips import Lpips
from pipeline.metrics.psnr import Psnr
from pipeline.metrics.ranking import ranking_of
from pipeline.metrics.squared_error import SquaredErrorMetric
from pipeline.metrics.ssim import Ssim

Metric = Annotated[
    SquaredErrorMetric
    | LogLikelihood
    | Psnr
    | Ssim
    | Lpips
    | Frechet
    | KernelDistance
    | ActiveUnits
    | KlPerDimension,
    Field(discriminator="kind"),
]

__all__ = [
    "EvaluatedBatch",
    "LogLikelihood",
    "MeanMetric",
    "Metric",
    "MetricBase",
    "SquaredErrorMetric",
    "ranking_of",
]
