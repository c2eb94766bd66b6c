"""Backbones: the encoder and decoder networks.

Add a kind: one file with a `BackboneBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.models.backbones.base import BackboneBase
from pipeline.models.backbones.burgess import Burgess
from pipeline.models.backbones.locatello import Locatello
from pipeline.models.backbones.mlp import Mlp
from pipeline.models.backbones.resnet import Resnet, latent_channels
from pipeline.models.backbones.tiny import Tiny

Backbone = Annotated[Burgess | Locatello | Mlp | Resnet | Tiny, Field(discriminator="kind")]

__all__ = [
    "Backbone",
    "BackboneBase",
    "Burgess",
    "Locatello",
    "Mlp",
    "Resnet",
    "Tiny",
    "latent_channels",
]
