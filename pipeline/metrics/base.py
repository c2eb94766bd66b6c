"""What every metric sees and offers.

    each micro-batch --sums, rows--> all processes together --value--> figures

# B images of a micro-batch
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.common.component import Component
from pipeline.losses.objective import Losses
from pipeline.models.autoencoder import ModelOutput
from pipeline.models.likelihoods import Likelihood


@dataclass(frozen=True)
class EvaluatedBatch:
    """A micro-batch of an evaluation, and what the model made of it."""

    uid: Tensor  # int64 [B]
    weight: Tensor  # float32 [B], 0 where the slot holds no sample
    clean: Tensor  # [B, *event] in [0, 1]
    corrupted: Tensor  # [B, *event], what the encoder saw
    mean: Tensor  # [B, *event], the reconstruction from the posterior's mean
    output: ModelOutput  # by one sample of the posterior
    losses: Losses
    likelihood: Likelihood
    # Runs the model again, as `AutoEncoder.forward`: equally often on all processes.
    model: Callable[..., ModelOutput]

    def total(self, values: Tensor) -> Tensor:
        """Return the weighted sum of values [B, ...] over the images, in float64 [...]."""
        weight = self.weight.view(-1, *[1] * (values.ndim - 1))
        # What a slot without a sample holds may be infinite: it must not reach the sum by 0 * inf.
        weighted = (values * weight).where(weight > 0, 0.0)
        return weighted.sum(0, dtype=torch.float64)


class MetricBase(Component):
    """A figure, or several, of a held-out split."""

    kind: str

    @property
    def max_rows(self) -> int:
        """How many images' rows are kept; the same ones on any number of processes."""
        return 0

    def sums(self, seen: EvaluatedBatch) -> dict[str, Tensor]:
        """Return what is added up over micro-batches and processes, in float64; any shapes."""
        del seen
        return {}

    def rows(self, seen: EvaluatedBatch) -> Tensor | None:
        """Return a row [B, ...] per image; `value` gets those of `max_rows` images at most."""
        del seen
        return None

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        """Return the figures, by name. rows: [n, ...], by ascending uid."""
        raise NotImplementedError


class MeanMetric(MetricBase):
    """Means over the images."""

    def per_image(self, seen: EvaluatedBatch) -> dict[str, Tensor]:
        """Return values [B] by the names of the figures; the same names for every micro-batch."""
        raise NotImplementedError

    def sums(self, seen: EvaluatedBatch) -> dict[str, Tensor]:
        """Return the number of images, and the sum of each value."""
        values = {name: seen.total(values) for name, values in self.per_image(seen).items()}
        return {"images": seen.weight.sum(dtype=torch.float64), **values}

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        """Return the means; NaN without an image."""
        del rows
        return {n: float(total / sums["images"]) for n, total in sums.items() if n != "images"}
