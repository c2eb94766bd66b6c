"""Likelihoods: decoder output and clean target -> distortion per element.

Add a kind: one file with a `LikelihoodBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.models.likelihoods.base import Learned, LikelihoodBase
from pipeline.models.likelihoods.bernoulli import Bernoulli
from pipeline.models.likelihoods.gaussian import GaussianLikelihood
from pipeline.models.likelihoods.squared_error import SquaredError

Likelihood = Annotated[SquaredError | GaussianLikelihood | Bernoulli, Field(discriminator="kind")]

__all__ = [
    "Bernoulli",
    "GaussianLikelihood",
    "Learned",
    "Likelihood",
    "LikelihoodBase",
    "SquaredError",
]
