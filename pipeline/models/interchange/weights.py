"""Weights from files, for a model that is there: own folders, diffusers' folders, single files.

folder or file -> tensors by their own names -> by the model's (`names`) -> compared with the model
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.models.autoencoder import AutoEncoder
from pipeline.models.interchange.folder import CONFIG, FORMAT, read_description, read_tensors
from pipeline.models.interchange.names import to_own

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_INDEX = f"{DIFFUSERS_WEIGHTS}.index.json"  # of weights in several files
IN_PIPELINE = "vae"  # the autoencoder's folder within that of a diffusion pipeline
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch's archives, and bare pickles
LIKELIHOOD = "likelihood."  # its parameters stay where one side has none
SHOWN = 3  # names in a message


def read_weights(path: Path, model: AutoEncoder) -> dict[str, Tensor]:
    """Return the weights at `path` by the model's names, in its precision.

    path: a folder of `export-model`, a folder of diffusers, or a single .safetensors file of
    diffusers, LDM or FLUX. Parameters of the likelihood are left out unless both sides have them.
    Raises UserError for pickles, for damage, and with the missing, unexpected and misshapen names
    of a file that holds another model.
    """
    if is_own_folder(path):
        return fitting(path, read_tensors(path, read_description(path)), model)
    return fitting(path, to_own(read_foreign(path)), model)


def is_own_folder(path: Path) -> bool:
    """Whether the folder of a model of this project lies there."""
    return _content(path / CONFIG).get("format") == FORMAT


def fitting(path: Path, found: Mapping[str, Tensor], model: AutoEncoder) -> dict[str, Tensor]:
    """Return the weights of `path` that the model needs, in its precision; see `read_weights`."""
    wanted = model.state_dict()
    optional = {n for n in {*found, *wanted} if n.startswith(LIKELIHOOD)} - (
        found.keys() & wanted.keys()
    )
    found = {name: value for name, value in found.items() if name not in optional}
    wanted = {name: value for name, value in wanted.items() if name not in optional}
    check_fit(path, found, wanted)
    return {name: found[name].to(value.dtype) for name, value in wanted.items()}


def check_fit(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless names and shapes of the weights at `path` are those wanted."""
    misshapen = [
        f"{name} {list(found[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": misshapen,
    }
    said = [f"{len(names)} {what} ({first(names)})" for what, names in problems.items() if names]
    if said:
        raise UserError(
            f"{path} does not hold the weights of this model, which has {len(wanted)} tensors: "
            f"{'; '.join(said)}. Give the settings of `model` that the file was trained with, or "
            "another file."
        )


def first(names: Sequence[str]) -> str:
    """Return the first names for a message."""
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def autoencoder_folder(path: Path) -> Path:
    """Return the folder of diffusers' autoencoder: `path`, or `vae` in the folder of a pipeline."""
    return path / IN_PIPELINE if (path / IN_PIPELINE / CONFIG).is_file() else path


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a diffusers folder or of a single file, by the names they have there.

    Raises UserError if there is none, or one that is damaged or a pickle.
    """
    if not path.is_dir():
        return _read_file(path)
    folder = autoencoder_folder(path)
    shards = _content(folder / DIFFUSERS_INDEX).get("weight_map")
    if isinstance(shards, dict):
        files = [folder / Path(str(name)).name for name in sorted(set(shards.values()))]
    else:
        files = [folder / DIFFUSERS_WEIGHTS]
        if not files[0].is_file():  # variants, as .fp16.safetensors, and pickles
            files = sorted(folder.glob("*.safetensors"))[:1] or _pickles(folder)[:1] or files
    return {name: value for file in files for name, value in _read_file(file).items()}


def _pickles(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in PICKLES)


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if file.suffix in PICKLES or start.startswith(PICKLE_STARTS):
        raise UserError(_of_pickle(file))
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged, or no safetensors file: {error}.") from error


def _of_pickle(file: Path) -> str:
    code = (
        "import torch, safetensors.torch as s; "
        f"t = torch.load('{file}', map_location='cpu', weights_only=True); "
        "t = t.get('state_dict', t); "
        f"s.save_file({{k: v.clone() for k, v in t.items() if hasattr(v, 'shape')}}, "
        f"'{file.with_suffix('.safetensors')}')"
    )
    return (
        f"{file} is a pickle, which can run any code when it is opened, so it is not read. If you "
        f'trust it, convert it once: python -c "{code}"'
    )


def _content(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or nothing where there is none."""
    if not file.is_file():
        return {}
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    return content if isinstance(content, dict) else {}
