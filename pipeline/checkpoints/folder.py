"""The files of a checkpoint: written atomically, verified before use, the same for any strategy.

    <run>/checkpoints/step-N/
        model.safetensors  ema.safetensors  optimizer.safetensors
        state.json         step and position, ids of data and order
        MANIFEST.json      bytes and sha256 of the others, written last

Save: all files are written and flushed in `step-N.tmp-*`, then the directory is renamed, then old
checkpoints are removed (see `retention`). Load: the newest checkpoint that verifies on every
process; a damaged one is set aside as `step-N.corrupt-*`, with a message. No file is a pickle.
"""

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.common.console import warn
from pipeline.common.errors import UserError
from pipeline.common.files import (
    publish,
    sha256_file,
    sync_directory,
    sync_file,
    temporary_name,
    write_json,
)
from pipeline.distributed.strategies.base import FullState, Named

MANIFEST = "MANIFEST.json"
FORMAT = "latentmill-checkpoint-1"
_STEP = re.compile(r"step-(\d+)")

Weights = Literal["raw", "ema"]  # as trained, or their moving average
# The files with these weights; ema.safetensors has no buffers.
WEIGHT_FILES: dict[Weights, tuple[str, ...]] = {
    "raw": ("model.safetensors",),
    "ema": ("model.safetensors", "ema.safetensors"),
}


@dataclass(frozen=True)
class RunState:
    """The state of a run without the tensors."""

    step: int  # global batches consumed
    position: int  # samples consumed: T of the order
    num_updates: int  # updates applied; less than `step` if some were skipped
    order_id: str
    dataset_id: str
    world: int
    versions: dict[str, str]
    # What the run's first weights were read from: "kind" (run, folder, diffusers or file), and
    # "sha256", the digest of the weights. None, and left out of the file: random weights.
    init_from: dict[str, str] | None = None


class DamagedCheckpointError(Exception):
    """A checkpoint that does not verify; the message says which file and how."""


def save_checkpoint(directory: Path, state: RunState, tensors: FullState) -> Path:
    """Write `step-N` in `directory` and return its path; leave no files after an OSError.

    An existing checkpoint of that step is kept: it holds the same state.
    """
    final = directory / f"step-{state.step}"
    if final.exists():
        return final
    directory.mkdir(parents=True, exist_ok=True)
    staged = temporary_name(final)
    try:
        staged.mkdir()
        _write_files(staged, state, tensors)
        publish(staged, final)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return final


def _write_files(staged: Path, state: RunState, tensors: FullState) -> None:
    optimizer = {f"exp_avg.{name}": value for name, value in tensors.exp_avg.items()}
    optimizer |= {f"exp_avg_sq.{name}": value for name, value in tensors.exp_avg_sq.items()}
    files = {"model": tensors.model, "optimizer": optimizer}
    if tensors.ema is not None:
        files["ema"] = tensors.ema
    content = {name: value for name, value in asdict(state).items() if value is not None}
    write_json(staged / "state.json", content)
    for name, content in files.items():
        path = staged / f"{name}.safetensors"
        try:
            save_file(content, path)
        except SafetensorError as error:  # raised for a full disk
            raise OSError(f"{path.name}: {error}") from error
        # safetensors allows only the owner to read; other files get their mode from the umask.
        shutil.copymode(staged / "state.json", path)
        sync_file(path)
    names = sorted(path.name for path in staged.iterdir())
    listing = {
        name: {"bytes": (staged / name).stat().st_size, "sha256": sha256_file(staged / name)}
        for name in names
    }
    write_json(staged / MANIFEST, {"format": FORMAT, "files": listing})
    sync_directory(staged)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the published checkpoints, newest first."""
    if not directory.is_dir():
        return []
    found = [(int(m[1]), p) for p in directory.iterdir() if (m := _STEP.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify_checkpoint(path: Path, only: Collection[str] | None = None) -> None:
    """Raise DamagedCheckpointError unless every file has the size and hash of the manifest.

    only: the files to check besides state.json; None: all.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, expected in files.items():
            if only is not None and name not in (*only, "state.json"):
                continue
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise DamagedCheckpointError(
                    f"{name} has {size} bytes instead of {expected['bytes']}"
                )
            if sha256_file(path / name) != expected["sha256"]:
                raise DamagedCheckpointError(f"{name} does not have the sha256 of the manifest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} or a file it lists: {error}") from error
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpointError(
            f"{MANIFEST} says format {manifest.get('format')!r}, not {FORMAT}"
        )
    missing = {"model.safetensors", "optimizer.safetensors", "state.json"} - files.keys()
    missing |= {file.name for file in path.glob("*.safetensors")} - files.keys()
    if missing:
        raise DamagedCheckpointError(f"{MANIFEST} does not list {', '.join(sorted(missing))}")


def is_whole(path: Path) -> bool:
    """Tell whether every file of a checkpoint verifies."""
    try:
        verify_checkpoint(path)
    except DamagedCheckpointError:
        return False
    return True


def read_state(path: Path) -> RunState:
    """Read `state.json` of a verified checkpoint."""
    return RunState(**json.loads((path / "state.json").read_bytes()))


def read_tensors(path: Path) -> FullState:
    """Read the tensors of a verified checkpoint, on the CPU."""
    optimizer = load_file(path / "optimizer.safetensors")
    ema = path / "ema.safetensors"
    return FullState(
        model=load_file(path / "model.safetensors"),
        ema=load_file(ema) if ema.exists() else None,
        exp_avg=_with_prefix(optimizer, "exp_avg."),
        exp_avg_sq=_with_prefix(optimizer, "exp_avg_sq."),
        num_updates=read_state(path).num_updates,
    )


def read_weights(path: Path, weights: Weights) -> Named:
    """Read only the model's tensors, on the CPU, from a checkpoint whose WEIGHT_FILES verify.

    Raises UserError if the run kept no average.
    """
    model = load_file(path / "model.safetensors")
    if weights == "raw":
        return model
    average = path / "ema.safetensors"
    if not average.exists():
        raise UserError(f"{path} holds no averaged weights (ema_decay: null): ask for weights: raw")
    return model | load_file(average)


def _with_prefix(values: Named, prefix: str) -> Named:
    return {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint to `step-N.corrupt-*` and warn."""
    aside = path.with_name(temporary_name(path).name.replace(".tmp-", ".corrupt-"))
    publish(path, aside)
    warn(
        f"the checkpoint {path} is damaged ({reason}); it is set aside as {aside.name} and the "
        "newest older one that verifies is used"
    )


def find_checkpoint(directory: Path, step: int | None, only: Collection[str] | None = None) -> Path:
    """Return the checkpoint of `step`, or (None) the newest that verifies; for readers of a run.

    only: see `verify_checkpoint`. Raises UserError if there is none, or if the checkpoint of an
    explicit step is damaged.
    """
    if step is not None:
        path = directory / f"step-{step}"
        if not path.is_dir():
            have = ", ".join(p.name for p in reversed(list_checkpoints(directory))) or "none"
            raise UserError(f"there is no checkpoint {path}; there: {have}")
        try:
            verify_checkpoint(path, only)
        except DamagedCheckpointError as error:
            raise UserError(f"the checkpoint {path} is damaged: {error}") from error
        return path
    for path in list_checkpoints(directory):
        try:
            verify_checkpoint(path, only)
        except DamagedCheckpointError as error:
            warn(f"skipping {path}: {error}")
            continue
        return path
    raise UserError(
        f"there is no checkpoint that verifies in {directory}: has the run saved one yet?"
    )


def remove_unfinished(directory: Path) -> None:
    """Remove the directories of saves that were killed; only for the process that saves."""
    for path in directory.glob("step-*.tmp-*"):
        shutil.rmtree(path)
