"""Models as files: the project's own folder, and those of diffusers and latent diffusion.

Own folders: `folder`. Foreign ones: config.json in `diffusers`, names of weights in `names`, files
in `weights`.
"""

from pipeline.models.interchange.folder import (
    CONFIG,
    WEIGHTS,
    Description,
    Network,
    StoredValues,
    TensorInfo,
    check_absent,
    from_pretrained,
    read_description,
    save_pretrained,
)
from pipeline.models.interchange.weights import read_weights

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Description",
    "Network",
    "StoredValues",
    "TensorInfo",
    "check_absent",
    "from_pretrained",
    "read_description",
    "read_weights",
    "save_pretrained",
]
