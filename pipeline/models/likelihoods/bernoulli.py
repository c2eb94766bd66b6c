"""Independent Bernoulli elements, the decoder giving logits."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.likelihoods.base import Learned, LikelihoodBase


class Bernoulli(LikelihoodBase):
    """-[x ln p + (1 - x) ln(1 - p)] per element, p = sigmoid(decoded), from logits.

    For values strictly between 0 and 1 the minimum of this cross-entropy is their entropy.
    """

    kind: Literal["bernoulli"] = "bernoulli"

    def nll(self, decoded: Tensor, target: Tensor, learned: Learned) -> Tensor:
        """Return the cross-entropy of every element [B, *event], in nats."""
        del learned
        return F.binary_cross_entropy_with_logits(decoded, target, reduction="none")

    def mean(self, decoded: Tensor) -> Tensor:
        """Return the probability of every element [B, *event]."""
        return torch.sigmoid(decoded)
