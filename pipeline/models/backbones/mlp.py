"""Fully connected networks, for events of any shape."""

import math
from itertools import pairwise
from typing import Literal

from pydantic import PositiveInt
from torch import nn

from pipeline.models.backbones.base import BackboneBase, initialise_


class Mlp(BackboneBase):
    """Hidden layers `hidden` with ReLU in the encoder, mirrored in the decoder; vector latents.

    An empty list gives two linear maps: with a Gaussian likelihood of identity link and a Gaussian
    bottleneck, the linear-Gaussian model (probabilistic PCA).
    """

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = (512, 256)  # units of each layer

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Accept every event: it is flattened."""

    def encoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        sizes = (math.prod(event_shape), *self.hidden, num_channels)
        return initialise_(nn.Sequential(nn.Flatten(), *_layers(sizes)))

    def decoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        sizes = (num_channels, *reversed(self.hidden), math.prod(event_shape))
        return initialise_(nn.Sequential(*_layers(sizes), nn.Unflatten(1, event_shape)))


def _layers(sizes: tuple[int, ...]) -> list[nn.Module]:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for size, next_size in pairwise(sizes):
        layers += [nn.Linear(size, next_size), nn.ReLU()]
    return layers[:-1]
