"""What a held-out evaluation measures besides the objective itself.

Add a kind: one file with a `MetricBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.metrics.base import MeanMetric, MetricBase, Seen
from pipeline.metrics.likelihood import LogLikelihood
from pipeline.metrics.squared_error import SquaredError

Metric = Annotated[SquaredError | LogLikelihood, Field(discriminator="kind")]

__all__ = ["LogLikelihood", "MeanMetric", "Metric", "MetricBase", "Seen", "SquaredError"]
