"""What the extra `train` brings, and what a command says where it is missing.

A plain `pip install latentmill` holds what `pipeline.latents` needs to read an export. Whatever
needs more ends with one paragraph and exit code 2: modules that are run by `python -m` call `check`
before they import the rest; `latentmill VERB` looks up in `missing` what it could not import.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from pipeline.common.errors import WRONG_USE

# The extra's packages under the names that they are imported by.
TRAIN = (
    "accelerate",
    "cv2",
    "PIL",
    "psutil",
    "safetensors",
    "simplejpeg",
    "sklearn",
    "torch",
    "wandb",
    "webdataset",
    "yaml",
)


def is_missing(name: str) -> bool:
    """Whether a package is not installed; imports nothing."""
    return find_spec(name) is None


def missing() -> list[str]:
    """Which of them are not installed; imports none."""
    return [name for name in TRAIN if is_missing(name)]


def remedy(names: Sequence[str]) -> str:
    """Say that `names` are missing, and what to install."""
    return (
        f"not installed here: {', '.join(names)}. A light installation of latentmill reads exports "
        "only; `pip install 'latentmill[train]'` adds what packing, training and exporting need."
    )


def expand_urls(pattern: str) -> list[str]:
    """Expand `::` and braces by webdataset's own rules; imports it only now, see `missing`."""
    from webdataset.shardlists import expand_urls  # noqa: PLC0415 - reading exports needs none

    return list(expand_urls(pattern))


def check() -> None:
    """End the program, as wrong use, where something of the extra is missing."""
    names = missing()
    if names:
        print(f"error: {remedy(names)}", file=sys.stderr)
        sys.exit(WRONG_USE)
