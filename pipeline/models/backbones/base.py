"""What every backbone offers."""

from torch import nn

from pipeline.component import Component


class BackboneBase(Component):
    """A pair of networks around a bottleneck of `num_channels` channels.

    Latents are vectors [B, num_channels] or maps [B, num_channels, H, W]: `latent_shape` says
    which.
    Every parameter has at least one dimension (DeepSpeed cannot shard a scalar).
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
