"""A bottleneck of four codes (van den Oord et al. 2017), with gradients through the nearest one."""

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.common.precision import widen
from pipeline.models.bottlenecks.base import BottleneckBase, Code

NUM_CODES = 4


class Codebook(BottleneckBase):
    """z is the nearest of four learned vectors."""

    kind: Literal["codebook"] = "codebook"
    commitment: float = 0.25

    def build(self) -> nn.Module:
        return NearestCode(self.size, self.commitment)


class NearestCode(nn.Module):
    """Straight-through: the encoder gets the decoder's gradient as it is."""

    def __init__(self, size: int, commitment: float) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(NUM_CODES, size))
        self.commitment = commitment
        # Not kept in checkpoints: it follows from the settings.
        self.register_buffer("numbers", torch.arange(NUM_CODES), persistent=False)

    def forward(self, statistics: Tensor, keys: Tensor | None = None) -> Code:
        del keys
        found = widen(statistics)
        codes = self.codes.to(found.dtype)
        ids = self.numbers[torch.cdist(found.detach(), codes.detach()).argmin(1)]
        chosen = codes[ids]
        penalties = {
            "codebook": (chosen - found.detach()).square().sum(1),
            "commitment": self.commitment * (chosen.detach() - found).square().sum(1),
        }
        return Code(found + (chosen - found).detach(), None, ids, penalties)
