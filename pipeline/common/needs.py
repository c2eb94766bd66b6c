"""The packages of the extra `train`, and the message if they are missing.

A plain `pip install latentmill` installs what `pipeline.latents` needs to read an export. Commands
that need more end with one paragraph and exit code 2: modules that are run by `python -m` call
`check` before other imports; `latentmill VERB` compares a failed import with `missing`.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from pipeline.common.errors import WRONG_USE

# The import names of the extra's packages.
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
    """Return the packages that are not installed; imports none."""
    return [name for name in TRAIN if is_missing(name)]


def remedy(names: Sequence[str]) -> str:
    """Return the message that `names` are missing, and what to install."""
    return (
        f"not installed here: {', '.join(names)}. A light installation of latentmill reads exports "
        "only; `pip install 'latentmill[train]'` adds what packing, training and exporting need."
    )


def check() -> None:
    """Exit with code 2 if a package of the extra is missing."""
    names = missing()
    if names:
        print(f"error: {remedy(names)}", file=sys.stderr)
        sys.exit(WRONG_USE)
