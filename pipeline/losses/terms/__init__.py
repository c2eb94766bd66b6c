"""Regularisers: terms on the posterior, each with a weight that may follow a schedule.

Add a kind: one file with a `RegulariserBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.losses.terms.base import RegulariserBase
from pipeline.losses.terms.kl import Kl, gaussian_kl

Regulariser = Annotated[Kl, Field(discriminator="kind")]

__all__ = ["Kl", "Regulariser", "RegulariserBase", "gaussian_kl"]
