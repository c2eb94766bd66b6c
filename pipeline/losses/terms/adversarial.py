"""The interface of adversarial terms: a discriminator, and the losses of both players.

`losses.players` trains both.
"""

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor, nn

from pipeline.common.component import Component
from pipeline.common.schedules import Schedule, value_at
from pipeline.losses.terms.base import TermBase


class DiscriminatorConfig(Component):
    """How the discriminator is trained; None = as for the autoencoder."""

    weight: Schedule = 1.0  # of its own loss; at 0 it is not trained
    rate: float = Field(default=1.0, gt=0)  # times optimizer.learning_rate
    beta1: float | None = Field(default=None, ge=0, lt=1)
    beta2: float | None = Field(default=None, ge=0, lt=1)


class AdversarialTerm(TermBase):
    """A term with a discriminator, which is trained with the autoencoder and never exported.

    Its value comes from `losses.players` instead of `per_image`. An evaluation leaves it out: the
    game needs a gradient, and averaged weights would meet a discriminator of another age.
    """

    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def build_discriminator(self, event_shape: tuple[int, ...]) -> nn.Module:
        """Return the module images [2 B, *event] -> judgements [2 B, ...], each image's its own."""
        raise NotImplementedError

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return what the autoencoder minimises [B], from the judgements of reconstructions."""
        raise NotImplementedError

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return what the discriminator minimises [B]."""
        raise NotImplementedError

    def discriminator_weight_at(self, samples: int) -> float:
        """Weight of the discriminator's own loss when `samples` samples have been seen."""
        return value_at(self.discriminator.weight, samples)


@dataclass(frozen=True)
class Game:
    """What one forward pass of both players gives, per image."""

    real: Tensor  # [B, ...] the discriminator's judgement of the clean images,
    fake: Tensor  # [B, ...] and of the reconstructions, without the autoencoder's graph
    # While the autoencoder plays: its loss [B], without a graph, and the gradient of the loss's sum
    # at the reconstructions [B, *event].
    generator: tuple[Tensor, Tensor] | None
