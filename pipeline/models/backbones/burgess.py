"""The convolutional network of Burgess et al. 2018 ("Understanding disentangling in beta-VAE").

Architecture after their appendix A: four 4 x 4 convolutions with stride 2 and 32 channels (three
for 32 x 32 images), two hidden layers of 256, ReLU throughout, and the mirror image as decoder.
"""

from typing import Literal

from torch import nn

from pipeline.models.backbones.base import BackboneBase, initialise_

CHANNELS = 32
HIDDEN = 256
SMALLEST = 4  # pixels of the innermost map


class Burgess(BackboneBase):
    """Vector latents of 64 x 64 (502,005 parameters with one channel, Z = 10) or 32 x 32 images."""

    kind: Literal["burgess"] = "burgess"

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the event is a square image of 32 or 64 pixels."""
        if len(event_shape) != 3 or event_shape[1:] not in ((32, 32), (64, 64)):
            raise ValueError(
                "backbone burgess takes images [C, 64, 64] or [C, 32, 32], not "
                f"{list(event_shape)}: "
                "set data.decode.size to 64 or 32, or take another backbone"
            )

    def encoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        """Return images [B, C, H, W] -> [B, num_channels]."""
        layers: list[nn.Module] = []
        channels = event_shape[0]
        for _ in range(_num_convolutions(event_shape)):
            layers += [nn.Conv2d(channels, CHANNELS, 4, stride=2, padding=1), nn.ReLU()]
            channels = CHANNELS
        layers += [nn.Flatten()]
        for size in (CHANNELS * SMALLEST**2, HIDDEN):
            layers += [nn.Linear(size, HIDDEN), nn.ReLU()]
        return initialise_(nn.Sequential(*layers, nn.Linear(HIDDEN, num_channels)))

    def decoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        """Return [B, num_channels] -> images [B, C, H, W]."""
        layers: list[nn.Module] = []
        size = num_channels
        for next_size in (HIDDEN, HIDDEN, CHANNELS * SMALLEST**2):
            layers += [nn.Linear(size, next_size), nn.ReLU()]
            size = next_size
        layers += [nn.Unflatten(1, (CHANNELS, SMALLEST, SMALLEST))]
        for _ in range(_num_convolutions(event_shape) - 1):
            layers += [nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, stride=2, padding=1), nn.ReLU()]
        layers += [nn.ConvTranspose2d(CHANNELS, event_shape[0], 4, stride=2, padding=1)]
        return initialise_(nn.Sequential(*layers))


def _num_convolutions(event_shape: tuple[int, ...]) -> int:
    """4 halvings lead from 64 pixels to 4, 3 from 32."""
    return (event_shape[1] // SMALLEST).bit_length() - 1
