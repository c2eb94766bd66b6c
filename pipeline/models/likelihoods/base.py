"""The interface of likelihoods."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.common.component import Component

Learned = dict[str, Tensor]  # a likelihood's own parameters, each of shape [1]
# How decoder values become means. A sigmoid keeps them in (0, 1), but with a squared error its
# vanishing gradients can keep the model at all-black images (LOG.md), so identity is the default.
Link = Literal["sigmoid", "identity"]


class LikelihoodBase(Component):
    """p(x | decoded): the decoder gives one value per element; see each kind for its meaning."""

    def initial(self) -> Learned:
        """Return the learned parameters at their initial values; most kinds have none."""
        return {}

    def nll(self, decoded: Tensor, target: Tensor, learned: Learned) -> Tensor:
        """Return the distortion of every element [B, *event], in nats if `is_nats`."""
        raise NotImplementedError

    def mean(self, decoded: Tensor) -> Tensor:
        """Return the reconstruction [B, *event], in the range of the data."""
        raise NotImplementedError

    @property
    def is_nats(self) -> bool:
        """Whether nll is -ln of a probability or density, constants included."""
        return True

    @property
    def is_density(self) -> bool:
        """Whether exp(-nll) is a density over [0, 1] values (then bits per dimension exist)."""
        return False

    def sigma2(self, learned: Learned) -> Tensor | None:
        """Return the variance [1] of an element given z, or None where the kind has none."""
        del learned
        return None


def apply_link(decoded: Tensor, link: Link) -> Tensor:
    """Map the decoder's values to means: into (0, 1), or unchanged."""
    return torch.sigmoid(decoded) if link == "sigmoid" else decoded
