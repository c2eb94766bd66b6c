"""A term that judges by a frozen network: how far the edges of a reconstruction are off."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.losses.terms.base import Networks, Reconstruction, TermBase


def edge_filter() -> nn.Module:
    """Two kernels of 3 x 3 on the mean of the channels."""
    network = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    with torch.no_grad():
        network.weight.copy_(torch.stack([sobel, sobel.T])[:, None])
    return network


class Edges(TermBase):
    """Sum of the squared differences of both edge maps."""

    kind: Literal["edges"] = "edges"

    def networks(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {"edges": edge_filter}

    def per_image(self, r: Reconstruction, networks: Networks) -> Tensor:
        network = networks["edges"]
        with torch.no_grad():
            wanted = network(r.clean.mean(1, keepdim=True))
        return (network(r.mean.mean(1, keepdim=True)) - wanted).square().flatten(1).sum(1)
