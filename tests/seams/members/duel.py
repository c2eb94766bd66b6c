"""A game: a discriminator of two layers, hinge losses."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.terms.adversarial import AdversarialTerm


class Duel(AdversarialTerm):
    """LDM's hinge losses; an image's judgement is the mean over its places."""

    kind: Literal["duel"] = "duel"

    def build_discriminator(self, event_shape: tuple[int, ...]) -> nn.Module:
        channels = event_shape[0]
        return nn.Sequential(
            nn.Conv2d(channels, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 2, 1)
        )

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -fake.flatten(1).mean(1)

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = (F.relu(1 - real), F.relu(1 + fake))
        return 0.5 * (real.flatten(1).mean(1) + fake.flatten(1).mean(1))
