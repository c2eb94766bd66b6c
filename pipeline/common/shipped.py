"""The settings that come with the package: `configs/`, installed inside of latentmill.

    what a person typed -> an existing file, else the shipped settings of that name -> a path

A bare name stands for settings of one kind: vae of a training, zero2 of a topology, zero2.json of
DeepSpeed.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pipeline.common.errors import UserError

Kind = Literal["train", "export", "accelerate", "deepspeed", "sweeps"]  # folders of configs/

MEANING: Mapping[Kind, str] = {
    "train": "trainings, for `latentmill train NAME`",
    "export": "exports, for `latentmill export run NAME`",
    "accelerate": "topologies, how the processes of a run start, for `--topology NAME`",
    "deepspeed": "settings of DeepSpeed, which topologies name",
    "sweeps": "sweeps of W&B, for `wandb sweep FILE`",
}
_ROOT = Path(__file__).parents[2]
# In a clone the folder lies beside the package.
FOLDER = next(path for path in (_ROOT / "latentmill/configs", _ROOT / "configs") if path.is_dir())


def shipped(kind: Kind) -> dict[str, Path]:
    """The shipped settings of one kind by name, sorted."""
    files = sorted((FOLDER / kind).iterdir())
    return {path.stem if path.suffix == ".yaml" else path.name: path for path in files}


def find(kind: Kind, given: str | Path) -> Path:
    """The file that `given` names: one that exists, else shipped settings.

    Raises UserError, with the names that there are, if it is neither.
    """
    path, names = Path(given), shipped(kind)
    if path.is_file():
        return path
    if str(given) in names:
        return names[str(given)]
    near = get_close_matches(str(given), names, n=1)
    near += get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    what = "topology" if kind == "accelerate" else "config"
    raise UserError(
        f"The {what} file {path} does not exist, and no settings of that name are shipped."
        f"{hint} Shipped are {', '.join(names)}; `latentmill config NAME` prints them."
    )


def purpose(path: Path) -> str:
    """What shipped settings are for, in one line: their first comment, which JSON cannot have."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("# ") if first.startswith("#") else f"how {path.stem} shards a model"
