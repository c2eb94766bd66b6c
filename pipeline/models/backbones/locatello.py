"""The convolutional network of Locatello et al. 2019 ("Challenging common assumptions ...").

Architecture after their appendix, table 1 (arXiv 1811.12359), as disentanglement_lib has it: ReLU
throughout, TensorFlow's "same" padding, Glorot's uniform weights and zero biases. Their training:
batch 64, Adam 1e-4, 300,000 steps, Bernoulli likelihood.
"""

from typing import Literal

from torch import nn

from pipeline.models.backbones.base import BackboneBase, initialise_

SIDE = 64  # pixels of an image
SMALLEST = 4  # pixels of the innermost map
HIDDEN = 256
# (channels, kernel, padding) of the encoder's convolutions: "same" pads one pixel for kernel 4.
ENCODER = ((32, 4, 1), (32, 4, 1), (64, 2, 0), (64, 2, 0))
DECODER = (64, 64, 32, 32)  # channels before each transposed convolution, kernel 4


class Locatello(BackboneBase):
    """Vector latents of 64 x 64 images (690,517 parameters with one channel, Z = 10)."""

    kind: Literal["locatello"] = "locatello"

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the event is a square image of 64 pixels."""
        if len(event_shape) != 3 or event_shape[1:] != (SIDE, SIDE):
            raise ValueError(
                f"backbone locatello takes images [C, 64, 64], not {list(event_shape)}: set "
                "data.decode.size to 64, or take another backbone"
            )

    def encoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        layers: list[nn.Module] = []
        before = event_shape[0]
        for channels, kernel, padding in ENCODER:
            layers += [nn.Conv2d(before, channels, kernel, stride=2, padding=padding), nn.ReLU()]
            before = channels
        layers += [nn.Flatten(), nn.Linear(before * SMALLEST**2, HIDDEN), nn.ReLU()]
        return initialise_(nn.Sequential(*layers, nn.Linear(HIDDEN, num_channels)), gain=1.0)

    def decoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        first = DECODER[0]
        layers: list[nn.Module] = [
            *(nn.Linear(num_channels, HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, first * SMALLEST**2), nn.ReLU()),
            nn.Unflatten(1, (first, SMALLEST, SMALLEST)),
        ]
        for before, channels in zip(DECODER, (*DECODER[1:], event_shape[0]), strict=True):
            layers += [nn.ConvTranspose2d(before, channels, 4, stride=2, padding=1), nn.ReLU()]
        return initialise_(nn.Sequential(*layers[:-1]), gain=1.0)
