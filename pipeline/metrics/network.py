"""What metrics of a network's features share: the user's file, and what it says of images."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.common.errors import UserError
from pipeline.metrics.base import EvaluatedBatch
from pipeline.metrics.images import ImageMetric, as_rgb
from pipeline.models.weights_file import WeightsFile

# NVIDIA's TorchScript of the Inception network of 2015-12-05, whose distance is called FID:
# https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
IMAGES_AT_ONCE = 16  # by a network, which may enlarge them: bounds its memory


class NetworkFile(WeightsFile):
    """A TorchScript network: uint8 [B, 3, H, W] to features [B, D].

    If its `forward` has an argument `return_features`, it is called with True.
    """

    # Of the network in the figures' names: null: the file's name without its ending.
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] | None = None

    @property
    def figure_name(self) -> str:
        """What tells the network's figures from those of others: its name and its digest."""
        stem = self.path.rsplit("/", 1)[-1].rsplit(".", 1)[0].lower()
        name = self.name or re.sub(r"[^a-z0-9]+", "_", stem).strip("_")
        return f"{name}_{self.sha256[:8]}"

    def build(self) -> nn.Module:
        """Load the network; raises UserError."""
        self.check()
        try:
            with warnings.catch_warnings():  # torch.jit is deprecated, but published files use it
                warnings.simplefilter("ignore", DeprecationWarning)
                script: Any = torch.jit.load(self.path, map_location="cpu")
            arguments = [argument.name for argument in script.forward.schema.arguments]
        except (RuntimeError, AttributeError, ValueError) as error:
            text = "TorchScript network: write one with torch.jit.save"
            raise UserError(self._is_no(text)) from error
        return ScriptedFeatures(script, self.path, with_flag="return_features" in arguments)


class ScriptedFeatures(nn.Module):
    """A TorchScript network whose output is checked."""

    def __init__(self, script: nn.Module, path: str, *, with_flag: bool) -> None:
        super().__init__()
        self.script, self._path = script, path
        self._settings = {"return_features": True} if with_flag else {}

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, D] of uint8 [B, 3, H, W]; raises UserError if they are none."""
        about = f"{self._path} (evaluation.metrics), given uint8 {list(images.shape)},"
        try:
            features = self.script(images, **self._settings)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{about} failed: {reason}.") from None
        if not isinstance(features, Tensor):
            found = type(features).__name__
        elif features.ndim != 2 or len(features) != len(images) or not features.is_floating_point():
            found = f"{str(features.dtype).removeprefix('torch.')} {list(features.shape)}"
        else:
            return features
        raise UserError(
            f"{about} gave {found}, but a network for frechet and kid gives floating point "
            f"features [{len(images)}, D]: save one that does, with torch.jit.save."
        )


class FeatureMetric(ImageMetric):
    """Compares the features of images with those of their reconstructions.

    Pictures go to the network as bytes, as a PNG holds them; a grey one three times.
    """

    # {path, sha256, name}: see `NetworkFile`.
    network: NetworkFile

    @property
    def figure_kinds(self) -> tuple[str, str]:
        """What the figure is called: with any network, and with the one of FID."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        usual, known = self.figure_kinds
        is_known = self.network.sha256 == INCEPTION_SHA256
        return self.named(known if is_known else f"{usual}_{self.network.figure_name}")

    @property
    def files(self) -> Sequence[WeightsFile]:
        return (self.network,)

    def networks(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {self.network.sha256: self.network.build}

    def features(self, batch: EvaluatedBatch) -> tuple[Tensor, Tensor]:
        """Return features [B, D] of images and reconstructions; computed once for all metrics."""
        network = batch.networks[self.network.sha256]

        def of(levels: Tensor) -> Tensor:
            pictures = as_rgb(levels).to(torch.uint8)
            return torch.cat([network(part) for part in pictures.split(IMAGES_AT_ONCE)])

        clean, decoded = self.levels(batch)
        return (
            batch.once((self.network.sha256, "clean"), lambda: of(clean)),
            batch.once((self.network.sha256, self.decodes), lambda: of(decoded)),
        )
