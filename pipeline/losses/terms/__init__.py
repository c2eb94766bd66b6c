"""Terms that are added to the distortion, each with a weight that may follow a schedule.

Add a kind: one file with a `TermBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.losses.terms.adversarial import AdversarialTerm, Game
from pipeline.losses.terms.base import Networks, Reconstruction, TermBase
from pipeline.losses.terms.kl import Kl, gaussian_kl

Term = Annotated[Kl, Field(discriminator="kind")]

__all__ = [
    "AdversarialTerm",
    "Game",
    "Kl",
    "Networks",
    "Reconstruction",
    "Term",
    "TermBase",
    "gaussian_kl",
]
