"""The interface of models that can be exported.

# B samples; event = shape of one sample; latent = shape of one latent
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.common.component import Component
from pipeline.data.decode import Decode
from pipeline.data.decode.image import Size
from pipeline.data.settings import DataConfig
from pipeline.models.autoencoder import AutoEncoder, encoder_sha256
from pipeline.training.resizing import decode_at, model_at


@dataclass(frozen=True)
class OpenEncoder:
    """A model that is ready to encode."""

    where: str  # run directory or folder, for messages
    decode: Decode  # how files become events
    data: DataConfig | None  # that it was trained on, if known
    latent_shape: tuple[int, ...]  # of every output
    outputs: tuple[str, ...]  # mu and, if the posterior has one, logvar
    encode: Callable[[Tensor], Mapping[str, Tensor]]  # x [B, *event] in [0, 1] -> [B, *latent]
    identity: Mapping[str, Any]  # what the latents depend on: digests, architecture


class EncoderBase(Component):
    """Names a model to encode with."""

    def open(self, device: torch.device, size: Size | None = None) -> OpenEncoder:
        """Load the model onto the device.

        size: of the pictures; None: that of the training. Raises UserError if the model is missing
        or damaged, or takes no pictures of that size.
        """
        raise NotImplementedError


def open_autoencoder(
    model: AutoEncoder,
    device: torch.device,
    *,
    size: Size | None,
    where: str,
    decode: Decode,
    data: DataConfig | None,
    weights: str,
    step: int,
    weights_sha256: str,
) -> OpenEncoder:
    """Return an autoencoder as an encoder, in fp32.

    size: of the pictures; None: that of `decode`. Raises UserError if it has no posterior, or takes
    no pictures of that size.
    """
    decode = decode_at(size, model.config, decode, where)
    model = model_at(model, decode).to(device=device, dtype=torch.float32)

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
            # Not a property of the network: it saves memory in training.
            "architecture": model.config.model_dump(
                mode="json", exclude={"gradient_checkpointing"}
            ),
        },
    )
