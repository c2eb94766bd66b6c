"""What every regulariser offers to the objective."""

from torch import Tensor

from pipeline.common.component import Component
from pipeline.common.schedules import Schedule, value_at
from pipeline.models.bottlenecks import Posterior


class RegulariserBase(Component):
    """weight(t) * R per image, in nats."""

    kind: str
    weight: Schedule = 1.0

    def weight_at(self, samples: int) -> float:
        """Weight when `samples` samples have been seen."""
        return value_at(self.weight, samples)

    @property
    def needs_random_posterior(self) -> bool:
        """Whether the term is undefined for a deterministic bottleneck."""
        return False

    def per_image(self, posterior: Posterior) -> Tensor:
        """Return the unweighted term of every image [B]."""
        raise NotImplementedError
