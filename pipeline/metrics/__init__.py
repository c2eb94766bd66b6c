"""What a held-out evaluation measures besides the objective itself.

Add a kind: one file with a `MetricBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.metrics.base import EvaluatedBatch, MeanMetric, MetricBase
from pipeline.metrics.likelihood import LogLikelihood
from pipeline.metrics.squared_error import SquaredErrorMetric

Metric = Annotated[SquaredErrorMetric | LogLikelihood, Field(discriminator="kind")]

__all__ = [
    "EvaluatedBatch",
    "LogLikelihood",
    "MeanMetric",
    "Metric",
    "MetricBase",
    "SquaredErrorMetric",
]
