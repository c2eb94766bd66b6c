"""The interface of backbones."""

import math

from torch import nn

from pipeline.common.component import Component


class BackboneBase(Component):
    """A pair of networks around a bottleneck of `num_channels` channels.

    Latents are vectors [B, num_channels] or maps [B, num_channels, H, W]: `latent_shape` says
    which.
    Every parameter has at least one dimension (DeepSpeed cannot shard a scalar). Both networks
    are returned initialised; for ReLU networks use `initialise_`.
    """

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError if the architecture is not defined for events of this shape."""
        raise NotImplementedError

    def latent_shape(self, event_shape: tuple[int, ...], num_channels: int) -> tuple[int, ...]:
        """Return the shape of one latent; a vector unless the backbone says otherwise."""
        del event_shape
        return (num_channels,)

    def encoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        """Return a network [B, *event] -> [B, num_channels, ...]."""
        raise NotImplementedError

    def decoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        """Return a network [B, num_channels, ...] -> [B, *event], without output non-linearity."""
        raise NotImplementedError


def initialise_(network: nn.Module) -> nn.Module:
    """Give every linear and convolutional layer weights that keep the signal's variance under ReLU.

    Uniform, variance 4 / (fan_in + fan_out), biases zero: Glorot and Bengio 2010, equation 16,
    with the gain sqrt(2) that He et al. 2015, equation 10, derive for ReLU. Under torch's defaults
    the signal fades over eight layers, and a VAE spends its first thousand steps on a plateau
    without information in z (LOG.md).
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2.0))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network
