"""LPIPS, a learned distance of an image and its reconstruction."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.data.decode import Decode, ImageDecode
from pipeline.metrics.base import EvaluatedBatch, MeanMetric
from pipeline.metrics.images import ImageMetric, as_rgb
from pipeline.models.autoencoder import ModelConfig
from pipeline.models.lpips import Trunk, load_lpips, smallest_size
from pipeline.models.weights_file import WeightsFile

PIXELS_AT_ONCE = 1 << 19  # of images in the network: bounds its memory


class Lpips(ImageMetric, MeanMetric):
    """lpips_alex, lpips_vgg: the mean distance, version 0.1; see `pipeline.models.lpips`.

    Pictures as a PNG of 8 bits holds them; a grey one three times. Papers print either trunk; their
    figures do not compare.
    """

    kind: Literal["lpips"] = "lpips"
    # alex: for tables of super-resolution; vgg: for tables of latent diffusion models.
    trunk: Trunk = "alex"
    # {path, sha256} of the trunk's weights with torchvision's names: of its alexnet or vgg16.
    weights: WeightsFile

    @property
    def label(self) -> str:
        return self.named(f"lpips_{self.trunk}")

    @property
    def files(self) -> Sequence[WeightsFile]:
        return (self.weights,)

    def check(self, model: ModelConfig, decode: Decode) -> None:
        super().check(model, decode)
        smallest = smallest_size(self.trunk)
        if isinstance(decode, ImageDecode) and min(decode.height_and_width) < smallest:
            height, width = decode.height_and_width
            raise ValueError(
                f"metric lpips with trunk {self.trunk} needs pictures of at least {smallest} x "
                f"{smallest} pixels, but they have {height} x {width} (data.decode.size): of "
                "smaller ones its last layer keeps nothing. Leave the metric out"
            )

    def networks(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {self._network: partial(load_lpips, self.trunk, self.weights)}

    def per_image(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        clean, decoded = (as_rgb(images) for images in self.pair(batch))
        network = batch.networks[self._network].to(clean.dtype)
        at_once = max(PIXELS_AT_ONCE // clean[0, 0].numel(), 1)
        parts = zip(clean.split(at_once), decoded.split(at_once), strict=True)
        return {self.label: torch.cat([network(*part) for part in parts])}

    @property
    def _network(self) -> str:
        return f"lpips_{self.trunk}_{self.weights.sha256}"
