"""Where a Hugging Face data set lies on this machine, and which of its files hold which split.

folder, or name in the caches of huggingface_hub and datasets --`find_files`--> files by split

Splits and configurations are told from names as `datasets` does it.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipeline.common.errors import UserError

# Of a file's name: train-00000-of-00002, cifar10-train-00000-of-00002, train-00000-of-00001-a09b74
NUMBERED = re.compile(r"(?:.*-)?([\w.]+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass(frozen=True)
class DataFile:
    """A Parquet or Arrow file."""

    path: Path
    split: str
    folder: str = ""  # of its configuration below the data set's, if it has one


def find_files(source: str) -> tuple[Path, list[DataFile]]:
    """Return a data set's folder and its files, sorted by split and name.

    Raises UserError if nothing is found, and where files are missing or belong to several data
    sets.
    """
    found = [Path(source)] if Path(source).exists() else list(_cached(source))
    for folder in map(_snapshot, found):
        files = sorted(_files(folder), key=lambda file: (file.split, file.path))
        if files:
            _check(folder, files)
            return folder, files
    if found:
        raise UserError(
            f"{found[0]} holds no Parquet and no Arrow files. `datasets` may convert it: "
            f'python -c "from datasets import load_dataset; load_dataset({source!r}).save_to_disk('
            "'DIRECTORY')\", then `latentmill pack hf DIRECTORY OUT`."
        )
    raise UserError(
        f"{source} is no file or folder, and no data set of this name is in the caches of Hugging "
        f"Face ({' and '.join(map(str, _caches()))}). `hf download {source} --repo-type dataset` "
        "fetches it; pack downloads nothing."
    )


def _caches() -> tuple[Path, Path]:
    """The caches of huggingface_hub and of datasets, as their variables name them."""

    def variable(*names: str, default: Path) -> Path:
        set_ones = (os.environ[name] for name in names if os.environ.get(name))
        return Path(os.path.expandvars(next(set_ones, default))).expanduser()

    home = variable("XDG_CACHE_HOME", default=Path("~/.cache")) / "huggingface"
    home = variable("HF_HOME", default=home)
    return (
        variable("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", default=home / "hub"),
        variable("HF_DATASETS_CACHE", default=home / "datasets"),
    )


def _cached(name: str) -> Iterator[Path]:
    """Yield the folders of a data set in the caches."""
    hub, arrow = _caches()

    def plain(text: str) -> str:  # `datasets` writes names in snake case, and ___ for a slash
        return re.sub("[_/]", "", text).lower()

    below = [(hub, f"datasets--{name.replace('/', '--')}"), (arrow, name)]
    for cache, wanted in below:
        for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
            if folder.is_dir() and plain(folder.name) == plain(wanted):
                yield folder


def _snapshot(folder: Path) -> Path:
    """The newest snapshot of a data set in the Hub's cache; any other folder as it is."""
    snapshots, main = folder / "snapshots", folder / "refs/main"
    if not snapshots.is_dir():
        return folder
    names = sorted(path.name for path in snapshots.iterdir())
    if main.is_file() and main.read_text().strip() in names:
        return snapshots / main.read_text().strip()
    if len(names) != 1:
        raise UserError(f"{folder} holds {len(names)} snapshots: name one of {snapshots}/*.")
    return snapshots / names[0]


def _files(folder: Path) -> Iterator[DataFile]:
    """Yield the files of what `save_to_disk` wrote; else all Parquet files; else all Arrow ones."""
    if folder.is_file():
        yield DataFile(folder, _split_of(PurePath(folder.name))[0])
        return
    saved = False
    for path in sorted(folder.rglob("state.json")):
        try:
            state = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        if not isinstance(state, dict) or "_data_files" not in state:
            continue  # not of `datasets`
        # Both halves of a split data set keep the name of the whole: their folders tell.
        split = path.parent.name if path.parent != folder else state.get("_split") or "train"
        for file in state["_data_files"]:
            saved = True
            yield DataFile(path.parent / file["filename"], split)
    for suffix in () if saved else (".parquet", ".arrow"):
        found = False
        for path in folder.rglob(f"*{suffix}"):
            name = path.relative_to(folder)
            hidden = any(
                part.startswith(".") or part.endswith(".incomplete") for part in name.parts
            )
            if not hidden and not path.name.startswith("cache-"):  # of `datasets`
                found = True
                yield DataFile(path, *_split_of(name))
        if found:
            return


def _split_of(name: PurePath) -> tuple[str, str]:
    """Return a file's split, and the folder of its configuration."""
    folder = name.parent.as_posix()
    numbered = NUMBERED.fullmatch(name.stem)
    if numbered:
        return numbered[1], folder
    for depth, part in enumerate((*name.parent.parts, name.stem)):
        words = set(re.split("[-._ 0-9]+", part.lower()))
        for split, keywords in SPLITS.items():
            if words & keywords:
                return split, PurePath(*name.parts[:depth]).as_posix()
    if name.suffix == ".arrow" and "-" in name.stem:
        return name.stem.rpartition("-")[2], folder
    return "train", ""


def _check(folder: Path, files: list[DataFile]) -> None:
    """Raise UserError for several configurations, and for files that are missing."""
    folders: defaultdict[str, set[str]] = defaultdict(set)
    numbers: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for file in files:
        folders[file.split] |= {file.folder} - {""}
        numbered = NUMBERED.fullmatch(file.path.stem)
        if numbered:
            numbers[file.split, int(numbered[3])].add(int(numbered[2]))
    for split, names in folders.items():
        if len(names) > 1:
            raise UserError(
                f"{folder} holds several configurations with a split {split}: "
                f"{', '.join(sorted(names))}. Name the folder of one."
            )
    for (split, count), found in numbers.items():
        missing = sorted(set(range(count)) - found)
        if missing:
            raise UserError(
                f"{folder} holds {len(found)} of the {count} files of {split}; number "
                f"{missing[0]:05d} is missing: fetch the data set again."
            )
    lost = [file.path for file in files if not file.path.is_file()]
    if lost:
        raise UserError(f"{lost[0]} is missing: fetch the data set again.")
