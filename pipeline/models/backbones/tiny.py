"""The tiny autoencoder of latent diffusion (TAESD), with diffusers' parameter names.

Graph: `AutoencoderTiny` of diffusers, whose published weights take pictures in [0, 1]. No
normalisation, no attention: each latent sees its surroundings only. Torch's default initialisation.
Numbers of parameters: tests/models/.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from pipeline.models.backbones.base import BackboneBase, check_picture
from pipeline.models.backbones.resnet_layers import Stage, StagedNetwork, convolution, doubled

WIDTH = 64
BLOCKS = 3  # of each of the lower resolutions; the full one has one block
HALVINGS = 3
FACTOR = 2**HALVINGS
MAGNITUDE = 3.0  # of latents, which the decoder squashes: the published weights' own


class Tiny(BackboneBase):
    """Spatial latents [Z, H / 8, W / 8] of pictures whose sides 8 divides."""

    fully_convolutional: ClassVar[bool] = True

    kind: Literal["tiny"] = "tiny"

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the event is a picture whose sides 8 divides."""
        check_picture(self.kind, event_shape, FACTOR)

    def latent_shape(self, event_shape: tuple[int, ...], num_channels: int) -> tuple[int, ...]:
        return (num_channels, event_shape[1] // FACTOR, event_shape[2] // FACTOR)

    def encoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        layers: list[nn.Module] = [convolution(event_shape[0], WIDTH), Block()]
        for _ in range(HALVINGS):
            halving = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)
            layers += [halving, *(Block() for _ in range(BLOCKS))]
        return TinyNetwork(*layers, convolution(WIDTH, num_channels))

    def decoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        layers: list[nn.Module] = [convolution(num_channels, WIDTH), nn.ReLU()]
        for _ in range(HALVINGS):
            after = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
            layers += [*(Block() for _ in range(BLOCKS)), Doubling(), after]
        return TinyDecoder(*layers, Block(), convolution(WIDTH, event_shape[0]))


class TinyNetwork(StagedNetwork):
    """A chain of layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def stages(self) -> Sequence[Stage]:
        return list(self.layers)


class TinyDecoder(TinyNetwork):
    """A chain of layers behind `squashed`."""

    def stages(self) -> Sequence[Stage]:
        return [squashed, *self.layers]


class Block(nn.Module):
    """Three convolutions with ReLU between them, added to the input [B, WIDTH, H, W]; ReLU."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = (convolution(WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()


class Doubling(nn.Module):
    """Every pixel becomes 2 x 2."""

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x)


def squashed(z: Tensor) -> Tensor:
    """Bend latents smoothly into (-MAGNITUDE, MAGNITUDE)."""
    return MAGNITUDE * (z / MAGNITUDE).tanh()
