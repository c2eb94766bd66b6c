"""Sources of `pack`: each gives numbered samples with keys and members.

Add a kind: one file with a `PackSource`, and its name below; then `latentmill pack KIND` exists.
"""

from typing import Annotated

from pydantic import Field

from pipeline.data.pack.sources.base import Broken, PackSource, Part, Picture, Sample, Samples
from pipeline.data.pack.sources.folder import Folder
from pipeline.data.pack.sources.hf import HuggingFace
from pipeline.data.pack.sources.sprites import Sprites

Source = Annotated[Folder | HuggingFace | Sprites, Field(discriminator="kind")]

__all__ = [
    "Broken",
    "Folder",
    "HuggingFace",
    "PackSource",
    "Part",
    "Picture",
    "Sample",
    "Samples",
    "Source",
    "Sprites",
]
