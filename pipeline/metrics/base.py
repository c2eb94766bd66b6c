"""The inputs and the interface of metrics.

    each micro-batch --per_image--------> mean over the images of all processes --> figures
                     --sums, rows--> sum or gather over all processes --value--> figures

# B images of a micro-batch
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.common.component import Component
from pipeline.data.decode import Decode
from pipeline.losses.objective import Losses
from pipeline.losses.terms import Networks
from pipeline.models.autoencoder import ModelConfig, ModelOutput
from pipeline.models.likelihoods import Likelihood
from pipeline.models.weights_file import WeightsFile


@dataclass(frozen=True)
class EvaluatedBatch:
    """A micro-batch of an evaluation, with the outputs of the model."""

    uid: Tensor  # int64 [B]
    weight: Tensor  # float32 [B], 0 where the slot holds no sample
    clean: Tensor  # [B, *event] in [0, 1]
    corrupted: Tensor  # [B, *event], what the encoder saw
    mean: Tensor  # [B, *event], the reconstruction from the posterior's mean
    sample: Tensor  # [B, *event], the reconstruction from one sample of the posterior
    output: ModelOutput  # by one sample of the posterior
    losses: Losses
    likelihood: Likelihood
    # `AutoEncoder.forward`, to run the model again: equally often on all processes.
    model: Callable[..., ModelOutput]
    networks: Networks  # those of all metrics, see `MetricBase.networks`
    value_bits: int = 8  # of a value as the data holds it
    _shared: dict[Hashable, Tensor] = field(default_factory=dict)  # see `once`

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returned for the first metric that asked for `key`."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def total(self, values: Tensor) -> Tensor:
        """Return the weighted sum of values [B, ...] over the images, in float64 [...]."""
        weight = self.weight.view(-1, *[1] * (values.ndim - 1))
        # Values of slots without a sample may be infinite: `where` avoids 0 * inf in the sum.
        weighted = (values * weight).where(weight > 0, 0.0)
        return weighted.sum(0, dtype=torch.float64)


class MetricBase(Component):
    """One or several figures of a held-out split."""

    kind: str

    @property
    def label(self) -> str:
        """What tells the metric's figures from those of others; two with one label are refused."""
        return self.kind

    def check(self, model: ModelConfig, decode: Decode) -> None:
        """Raise ValueError, with the remedy, if the metric has no meaning for this model or data.

        decode: of the data that is evaluated.
        """
        del model, decode

    def networks(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return the frozen networks that the metric needs: name -> function that builds it.

        Metrics with the same name share one network. It is built on the device at the start of an
        evaluation, in evaluation mode, and freed at its end. Building may raise UserError.
        """
        return {}

    @property
    def files(self) -> Sequence[WeightsFile]:
        """The files of the networks, which are checked before anything starts."""
        return ()

    # Whether images with larger values are the better ones; see `ranked_by`.
    higher_is_better: ClassVar[bool] = False

    @property
    def ranked_by(self) -> str | None:
        """Name of the values per image that tell the best images from the worst; None: none do."""
        return None

    def per_image(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        """Return values [B] by name; their means over the images are figures of these names.

        The same names for every micro-batch.
        """
        del batch
        return {}

    @property
    def max_rows(self) -> int:
        """Number of images whose rows are kept; the same images on any number of processes."""
        return 0

    def sums(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        """Return what is added up over micro-batches and processes, in float64; any shapes."""
        del batch
        return {}

    def rows(self, batch: EvaluatedBatch) -> Tensor | None:
        """Return a row [B, ...] per image; `value` gets the rows of at most `max_rows` images."""
        del batch
        return None

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        """Return the figures of `sums` and `rows`, by name. rows: [n, ...], by ascending uid."""
        raise NotImplementedError

    def remarks(self, sums: Mapping[str, Tensor]) -> Sequence[str]:
        """Return warnings about the figures, which are printed once."""
        del sums
        return ()

    def vectors(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Return what is too long for figures, by name: written to the evaluation's file."""
        del sums
        return {}


class MeanMetric(MetricBase):
    """Means over the images."""

    @property
    def ranked_by(self) -> str | None:
        return self.label

    def per_image(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        raise NotImplementedError

    def value(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, float]:
        """Return the figures besides the means."""
        del sums, rows
        return {}
