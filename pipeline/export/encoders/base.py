"""What an export asks of a model, whatever keeps it.

# B samples; event = shape of one sample; latent = shape of one latent
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.common.component import Component
from pipeline.data.decode import Decode
from pipeline.data.settings import DataConfig
from pipeline.models.autoencoder import AutoEncoder, encoder_sha256


@dataclass(frozen=True)
class OpenEncoder:
    """A model that is ready to encode."""

    where: str  # what keeps it, for messages
    decode: Decode  # how files become events
    data: DataConfig | None  # what it was trained on, if that is known
    latent_shape: tuple[int, ...]  # of every output
    outputs: tuple[str, ...]  # names: mu, and where the posterior has one, logvar
    encode: Callable[[Tensor], Mapping[str, Tensor]]  # x [B, *event] in [0, 1] -> [B, *latent]
    identity: Mapping[str, Any]  # whatever of it decides a byte: digests, architecture


class EncoderBase(Component):
    """Where a model is."""

    def open(self, device: torch.device) -> OpenEncoder:
        """Load it onto the device; raises UserError if it is not there or damaged."""
        raise NotImplementedError


def open_autoencoder(
    model: AutoEncoder,
    device: torch.device,
    *,
    where: str,
    decode: Decode,
    data: DataConfig | None,
    weights: str,
    step: int,
    weights_sha256: str,
) -> OpenEncoder:
    """Return one of our models, ready to encode in fp32; UserError if it has no posterior."""
    model = model.to(device=device, dtype=torch.float32)

    def encode(x: Tensor) -> Mapping[str, Tensor]:
        return model(x, mode="encode").code.moments()

    with torch.inference_mode():
        outputs = tuple(encode(torch.zeros(1, *model.event_shape, device=device)))
    return OpenEncoder(
        where=where,
        decode=decode,
        data=data,
        latent_shape=model.latent_shape,
        outputs=outputs,
        encode=encode,
        identity={
            "weights": weights,
            "step": step,
            "weights_sha256": weights_sha256,
            "encoder_sha256": encoder_sha256(model),
            # How the training saved memory is no property of the network.
            "architecture": model.config.model_dump(
                mode="json", exclude={"gradient_checkpointing"}
            ),
        },
    )
