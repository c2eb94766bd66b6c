"""Backbones: the encoder and decoder networks.

Add a kind: one file with a `BackboneBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.models.backbones.base import BackboneBase
from pipeline.models.backbones.burgess import Burgess
from pipeline.models.backbones.mlp import Mlp

Backbone = Annotated[Burgess | Mlp, Field(discriminator="kind")]

__all__ = ["Backbone", "BackboneBase", "Burgess", "Mlp"]
