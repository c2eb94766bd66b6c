"""The interface of backbones."""

import math
from typing import Any, ClassVar

from torch import nn

from pipeline.common.component import Component


class BackboneBase(Component):
    """A pair of networks around a bottleneck of `num_channels` channels.

    Latents are vectors [B, num_channels] or maps [B, num_channels, H, W]: see `latent_shape`.
    Every parameter has at least one dimension (DeepSpeed cannot shard a scalar). Both networks
    are returned initialised; for ReLU networks use `initialise_`. A network may have `stages()`,
    where gradient checkpointing cuts it: see `stages_of` in `pipeline.models.autoencoder`.
    """

    # Whether the same weights take pictures of other heights and widths.
    fully_convolutional: ClassVar[bool] = False
    # The memory format that trains faster, by measurement on a CPU. Never changed once released:
    # a run's config.yaml holds it, so that the same file would no longer resume the run.
    channels_last: ClassVar[bool] = True

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError if the architecture is not defined for events of this shape."""
        raise NotImplementedError

    def latent_shape(self, event_shape: tuple[int, ...], num_channels: int) -> tuple[int, ...]:
        """Return the shape of one latent; a vector unless the backbone says otherwise."""
        del event_shape
        return (num_channels,)

    def encoder_settings(self) -> dict[str, Any]:
        """Return the settings of the encoder that are not the defaults: part of its digest."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def encoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        """Return a network [B, *event] -> [B, num_channels, ...]."""
        raise NotImplementedError

    def decoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        """Return a network [B, num_channels, ...] -> [B, *event], without output non-linearity."""
        raise NotImplementedError


def check_picture(kind: str, event_shape: tuple[int, ...], factor: int) -> None:
    """Raise ValueError unless the event is a picture whose height and width `factor` divides.

    The message names the nearest sizes that fit.
    """
    if len(event_shape) != 3:
        raise ValueError(
            f"backbone {kind} takes pictures [C, H, W], not {list(event_shape)}: take another "
            "backbone"
        )
    unfit = [side for side in event_shape[1:] if side % factor]
    if unfit:
        below = [max(side // factor, 1) * factor for side in event_shape[1:]]
        above = [-(-side // factor) * factor for side in event_shape[1:]]
        raise ValueError(
            f"backbone {kind} halves pictures {factor.bit_length() - 1} times, but "
            f"{' and '.join(map(str, unfit))} pixels are no multiple of {factor}: set "
            f"data.decode.size to {' or '.join(dict.fromkeys((str(below), str(above))))}"
        )


def initialise_(network: nn.Module, *, gain: float = math.sqrt(2.0)) -> nn.Module:
    """Give every linear and convolutional layer weights that keep the signal's variance under ReLU.

    Uniform, variance 4 / (fan_in + fan_out), biases zero: Glorot and Bengio 2010, equation 16,
    with the gain sqrt(2) that He et al. 2015, equation 10, derive for ReLU. Under torch's defaults
    the signal fades over eight layers, and a VAE spends its first thousand steps on a plateau
    without information in z (LOG.md).
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight, gain=gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network
