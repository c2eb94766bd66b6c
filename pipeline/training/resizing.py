"""A trained model for pictures of another size than those of its training.

settings of the model, its decoder of files, size -> `decode_at` -> decoder of that size
model, that decoder                               -> `model_at`  -> the same weights for that size
"""

from typing import Any

import torch

from pipeline.common.errors import UserError
from pipeline.data.decode import Decode
from pipeline.data.decode.image import Size
from pipeline.models.autoencoder import AutoEncoder, ModelConfig


def decode_at(size: Size | None, model: ModelConfig, decode: Decode, where: str) -> Decode:
    """Return the decoder for pictures of `size`; of None, that of the training.

    where: path of the model, for messages. Raises UserError unless the model takes such pictures.
    """
    if size is None:
        return decode
    backbone = model.backbone
    if decode.kind != "image":
        raise UserError(
            f"size is {_shown(size)}, but {where} takes arrays (data.decode.kind is "
            f"{decode.kind}): only pictures have a size. Leave it out."
        )
    settings: dict[str, Any] = decode.model_dump() | {"size": size}
    resized = type(decode)(**settings)
    if resized.event_shape == decode.event_shape:
        return decode
    if not backbone.fully_convolutional:
        raise UserError(
            f"size is {_shown(size)}, but {where} has the backbone {backbone.kind}, whose weights "
            f"take pictures of {_shown(decode.size)} pixels only. Leave size out, or take a model "
            "with a fully convolutional backbone, such as resnet."
        )
    try:
        backbone.check_event(resized.event_shape)
    except ValueError as error:
        # It speaks of a training's setting.
        text = str(error).replace("data.decode.size", "size")
        raise UserError(f"size is {_shown(size)}, but {where} cannot take that: {text}.") from None
    return resized


def model_at(model: AutoEncoder, decode: Decode) -> AutoEncoder:
    """Return the model with the same weights, in the same memory, for events of the decoder."""
    if model.event_shape == decode.event_shape:
        return model
    with torch.device("meta"):  # neither memory nor time for weights that are replaced
        resized = AutoEncoder(model.config, decode.event_shape)
    resized.load_state_dict(model.state_dict(), assign=True)
    return resized.train(model.training)


def _shown(size: object) -> str:
    return f"[{', '.join(map(str, size))}]" if isinstance(size, list | tuple) else str(size)
