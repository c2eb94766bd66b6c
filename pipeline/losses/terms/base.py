"""The inputs and the interface of the terms of the objective.

# B images of one micro-batch, or of a global batch: see `TermBase.scope`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from pipeline.common.component import Component
from pipeline.common.schedules import Schedule, value_at
from pipeline.models.bottlenecks import Posterior

Networks = Mapping[str, nn.Module]  # frozen ones, by name


@dataclass(frozen=True)
class Reconstruction:
    """Images and their reconstructions; float32 or float64 except mask and ids."""

    clean: Tensor  # [B, *event] in [0, 1], the target
    mean: Tensor  # [B, *event], the reconstruction in the range of the data, not clamped
    decoded: Tensor  # [B, *event], the decoder's output, the input of the likelihood
    mask: Tensor | None  # bool [B, *event], the corrupted elements
    posterior: Posterior | None  # None: quantised codes
    z: Tensor  # [B, *latent], the sample of the posterior; latent transforms come after it
    ids: Tensor | None  # int64 [B, ...]: quantised codes

    def fetched(self, fetch: Callable[[Tensor], Tensor]) -> "Reconstruction":
        """Return a copy whose tensors are `fetch` of these, each computed at its first use."""
        return cast(Reconstruction, _Fetched(self, fetch))


class _Fetched:
    def __init__(self, r: Reconstruction, fetch: Callable[[Tensor], Tensor]) -> None:
        self._r, self._fetch = r, fetch

    def __getattr__(self, name: str) -> Tensor | Posterior | None:
        """Fetch a field of the Reconstruction, once: it becomes an attribute."""
        value = getattr(self._r, name)
        if isinstance(value, Posterior):
            logvar = None if value.logvar is None else self._fetch(value.logvar)
            value = Posterior(self._fetch(value.mu), logvar)
        elif value is not None:
            value = self._fetch(value)
        setattr(self, name, value)
        return value


class TermBase(Component):
    """weight(t) * R per image, in nats."""

    kind: str
    weight: Schedule = 1.0

    def weight_at(self, samples: int) -> float:
        """Weight when `samples` samples have been seen."""
        return value_at(self.weight, samples)

    @property
    def needs_density(self) -> bool:
        """Whether the term is undefined for a bottleneck without a density."""
        return False

    @property
    def scope(self) -> Literal["image", "micro_batch", "global_batch"]:
        """Which images an image's loss depends on.

        image: that image only. global_batch: all images of the step, which `per_image` gets from
        all processes. micro_batch: the images that one process has at a time, so that the loss
        depends on processes and accumulation. Both without slots that hold no sample.
        """
        return "image"

    def networks(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return the frozen networks that the term needs: name -> function that builds it.

        Terms with the same name share one network. It is built once on the device, in evaluation
        mode. It is not part of the model: no optimizer, average or checkpoint holds it.
        """
        return {}

    def per_image(self, r: Reconstruction, networks: Networks) -> Tensor:
        """Return the unweighted term of every image [B].

        With scope `image` a slot without a sample is a black image, whose weight is 0: value and
        gradient must be finite there.
        """
        raise NotImplementedError
