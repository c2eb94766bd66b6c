"""What image metrics share: the reconstruction that they look at, and its rounding."""

from typing import Literal

from torch import Tensor

from pipeline.data.decode import Decode, ImageDecode
from pipeline.metrics.base import EvaluatedBatch, MetricBase
from pipeline.models.autoencoder import ModelConfig


def levels_of(x: Tensor) -> Tensor:
    """Round values in [0, 1] to the bytes 0 to 255 of a saved PNG, half to even; in x's dtype."""
    return x.clamp(0, 1).mul(255).round()


class ImageMetric(MetricBase):
    """A metric of images and their reconstructions, both as a saved PNG holds them."""

    # What is decoded: the posterior's mean, or one sample of it, which the figure's name then says.
    decodes: Literal["mean", "sample"] = "mean"

    @property
    def label(self) -> str:
        return self.named(self.kind)

    def named(self, figure: str) -> str:
        """Return the name of a figure, which says so if a sample was decoded."""
        return figure if self.decodes == "mean" else f"{figure}_sample"

    def check(self, model: ModelConfig, decode: Decode) -> None:
        if not isinstance(decode, ImageDecode):
            raise ValueError(
                f"metric {self.kind} compares pictures, but data.decode.kind is {decode.kind}: "
                "leave the metric out"
            )
        if decode.channels == 4:
            raise ValueError(
                f"metric {self.kind} compares pictures as they are seen, but data.decode.channels "
                "is 4: what is seen of transparent pixels depends on what lies behind them. Leave "
                "the metric out: squared_error compares the four channels as they are"
            )
        if decode.dtype != "uint8":
            raise ValueError(
                f"metric {self.kind} compares pictures as saved in 8 bits, but data.decode.dtype "
                f"is {decode.dtype}: leave the metric out; squared_error compares all bits"
            )
        if self.decodes == "sample" and not model.bottleneck.has_density:
            raise ValueError(
                f"metric {self.kind} with decodes: sample needs a density to sample from, but "
                f"model.bottleneck.kind is {model.bottleneck.kind}: take decodes: mean"
            )

    def levels(self, batch: EvaluatedBatch) -> tuple[Tensor, Tensor]:
        """Return images and reconstructions [B, C, H, W] as bytes 0 to 255, in the batch's dtype.

        Their differences are exact in float32; those of k / 255 have errors of 1e-5.
        """
        decoded = batch.mean if self.decodes == "mean" else batch.sample
        return levels_of(batch.clean), levels_of(decoded)

    def pair(self, batch: EvaluatedBatch) -> tuple[Tensor, Tensor]:
        """Return images and reconstructions [B, C, H, W] as saved, in the batch's dtype."""
        clean, decoded = self.levels(batch)
        return clean / 255, decoded / 255


def as_rgb(x: Tensor) -> Tensor:
    """Return pictures [B, 3, H, W] of [B, 1 or 3, H, W]; a grey channel three times."""
    return x if x.shape[1] == 3 else x.repeat(1, 3, 1, 1)
