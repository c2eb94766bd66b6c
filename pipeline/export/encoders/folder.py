"""A model without its run, as `latentmill export-model` writes it."""

import json
from typing import Literal

import torch
from pydantic import TypeAdapter

from pipeline.data.decode import Decode
from pipeline.data.decode.image import Size
from pipeline.export.encoders.base import EncoderBase, OpenEncoder, open_autoencoder
from pipeline.models.interchange import from_pretrained, read_description


class FolderEncoder(EncoderBase):
    """An exported model, which has `decode` settings and no data set."""

    kind: Literal["folder"] = "folder"
    path: str  # what `latentmill export-model` wrote

    def open(self, device: torch.device, size: Size | None = None) -> OpenEncoder:
        description = read_description(self.path)
        decode: Decode = TypeAdapter(Decode).validate_json(json.dumps(description.decode))
        return open_autoencoder(
            from_pretrained(self.path),
            device,
            size=size,
            where=self.path,
            decode=decode,
            data=None,
            weights=description.weights,
            step=description.step,
            weights_sha256=description.weights_sha256,
        )
