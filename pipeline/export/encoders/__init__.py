"""Encoders: models whose latents can be exported.

Add a kind: one file with an `EncoderBase`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.export.encoders.base import EncoderBase, OpenEncoder
from pipeline.export.encoders.folder import FolderEncoder
from pipeline.export.encoders.run import RunEncoder

Encoder = Annotated[RunEncoder | FolderEncoder, Field(discriminator="kind")]

__all__ = ["Encoder", "EncoderBase", "FolderEncoder", "OpenEncoder", "RunEncoder"]
