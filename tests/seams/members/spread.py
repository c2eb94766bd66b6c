"""A term that is not linear in the batch: how far the latents' covariance is from the identity."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.losses.terms.base import Networks, Reconstruction, TermBase


class Spread(TermBase):
    """Of every image: its part of the squared distance, over its batch."""

    kind: Literal["spread"] = "spread"
    over: Literal["micro_batch", "global_batch"] = "global_batch"

    @property
    def scope(self) -> Literal["micro_batch", "global_batch"]:
        return self.over

    def per_image(self, r: Reconstruction, networks: Networks) -> Tensor:
        del networks
        z = r.z.flatten(1)
        centred = z - z.mean(0)
        excess = centred.T @ centred / len(z) - torch.eye(z.shape[1], dtype=z.dtype)
        own = (centred @ excess * centred).sum(1) - excess.diagonal().sum()
        return own + excess.square().sum()
