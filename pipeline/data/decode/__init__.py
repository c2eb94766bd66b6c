"""How a member's bytes become numbers: the list of choices (`decode.kind`).

member bytes --decode--> slot of a batch buffer (stored dtype) --to_unit--> float32 in [0, 1]
"""

from typing import Annotated

from pydantic import Field

from pipeline.data.decode.array import ArrayDecode
from pipeline.data.decode.fault import Content, DecodeError, missing_member
from pipeline.data.decode.image import ImageDecode

Decode = Annotated[ImageDecode | ArrayDecode, Field(discriminator="kind")]

__all__ = ["ArrayDecode", "Content", "Decode", "DecodeError", "ImageDecode", "missing_member"]
