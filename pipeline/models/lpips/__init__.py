"""LPIPS, a learned distance of images, as a network without its trunk's weights.

    x, y --trunk--> feature maps --unit length per position--> squared differences
      --linear weights--> mean over positions --sum over five layers--> distance [B]

Zhang, Isola, Efros, Shechtman and Wang 2018, "The unreasonable effectiveness of deep features as a
perceptual metric"; version 0.1. `linear.safetensors` holds the linear weights of the package
`lpips` 0.1.4, whose licence lies beside it; weights of the trunks come from the user's file.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.common.errors import UserError
from pipeline.models.weights_file import WeightsFile

Trunk = Literal["alex", "vgg"]
LINEAR = Path(__file__).parent / "linear.safetensors"  # TRUNK.LAYER: [C]
EPS = 1e-10  # added to lengths of feature vectors
# Of channels in [-1, 1], before the trunk.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Layer(NamedTuple):
    """A convolution followed by ReLU, or with channels 0 the largest value of each window."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0


POOL_2, POOL_3 = Layer(0, 2, 2), Layer(0, 3, 2)


def _convolutions(*channels: int) -> list[Layer]:
    return [Layer(number, 3, 1, 1) for number in channels]


LAYERS: dict[Trunk, list[Layer]] = {
    "alex": [
        Layer(64, 11, 4, 2),
        POOL_3,
        Layer(192, 5, 1, 2),
        POOL_3,
        *_convolutions(384, 256, 256),
    ],
    "vgg": [
        *_convolutions(64, 64),
        POOL_2,
        *_convolutions(128, 128),
        POOL_2,
        *_convolutions(256, 256, 256),
        POOL_2,
        *_convolutions(512, 512, 512),
        POOL_2,
        *_convolutions(512, 512, 512),
    ],
}
# Numbers of the ReLUs after which feature maps are compared, in torchvision's `features`.
COMPARED: dict[Trunk, tuple[int, ...]] = {
    "alex": (1, 4, 7, 9, 11),
    "vgg": (3, 8, 15, 22, 29),
}


def smallest_size(trunk: Trunk) -> int:
    """Return the least height and width of which a pixel of the last feature map is left."""
    size = 1
    for layer in reversed(LAYERS[trunk]):
        size = max((size - 1) * layer.stride + layer.kernel - 2 * layer.padding, 1)
    return size


class LpipsDistance(nn.Module):
    """The distance of images; computes in the dtype of its weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: Trunk) -> None:
        """Build with the linear weights; the trunk has none yet: see `load_lpips`."""
        super().__init__()
        self.compared = COMPARED[trunk]
        self.features = nn.Sequential()  # with torchvision's numbers
        channels = 3
        for layer in LAYERS[trunk]:
            if layer.channels == 0:
                self.features.append(nn.MaxPool2d(layer.kernel, layer.stride))
                continue
            kernel, stride, padding = layer[1:]
            convolution = nn.Conv2d(
                channels, layer.channels, kernel, stride, padding, device="meta"
            )
            self.features.append(convolution)
            self.features.append(nn.ReLU(inplace=True))
            channels = layer.channels
        linear = load_file(LINEAR)
        self.linear = nn.ParameterList(
            linear[f"{trunk}.{number}"] for number in range(len(self.compared))
        )
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return distances [B] of images x, y [B, 3, H, W] in [0, 1]."""
        x, y = self._scaled(x), self._scaled(y)
        total = x.new_zeros(len(x))
        linear = iter(self.linear)
        for number, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if number in self.compared:
                difference = (unit_length(x) - unit_length(y)).square()
                total = total + torch.einsum("bchw,c->bhw", difference, next(linear)).mean((1, 2))
        return total

    def _scaled(self, x: Tensor) -> Tensor:
        x = x.to(self.linear[0].dtype)
        return (2 * x - 1 - self.shift) / self.scale


def unit_length(features: Tensor) -> Tensor:
    """Divide feature vectors [B, C, H, W] by their lengths over the channels."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + EPS)


def load_lpips(trunk: Trunk, weights: WeightsFile) -> LpipsDistance:
    """Build the distance with a trunk's weights, whose names are torchvision's.

    Raises UserError if the file is another one, or lacks a weight of the trunk.
    """
    network = LpipsDistance(trunk)
    found = weights.tensors()
    wanted = {f"features.{name}": value for name, value in network.features.state_dict().items()}
    for name, value in wanted.items():
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(value.shape):
            has = "is missing" if shape is None else f"has shape {shape}"
            raise UserError(
                f"{weights.path} (evaluation.metrics) holds no trunk {trunk} with torchvision's "
                f"names: {name} {has}, but must have shape {tuple(value.shape)}. Name the file of "
                f"torchvision's {'alexnet' if trunk == 'alex' else 'vgg16'}, or the other trunk."
            )
    trunk_state = {name.removeprefix("features."): found[name].float() for name in wanted}
    network.features.load_state_dict(trunk_state, assign=True)
    return network
