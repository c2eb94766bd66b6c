"""Folders of pictures as people have them, with what `pack folder` must make of each file.

    seed, count -> pictures, names, sidecars, links: the truth -> the files

The truth is written down before the files are made.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.data.awkward_images import AwkwardImage, make

PACKED = ("jpg", "jpeg", "png", "webp")
FOLDERS = (
    *("cats", "__background__", "v1.0", "a b", "ü", "日本", "100%", "%41", "x__y__", "__one"),
    *("caf\udce9", "-dash", "cats/deep.er/__in__", "new\nline", "tab\t", "'\"&<>\\", "l" * 200),
)
STEMS = (
    *("{}", "IMG_2024.{}", "{}..b", "{}%2E", "{} copy", " {}", "__{}__", "{}\udcff", "ä{}", "日{}"),
    *("{}\nb", "{}" + "n" * 150, "{}%", "-{}", "{}~", "{}."),
)
BESIDE = {
    "._{}.jpg": "sidecar",
    ".DS_Store": "sidecar",
    "Thumbs.db": "sidecar",
    "__MACOSX/{}.png": "sidecar",
    ".hidden{}.png": "hidden",
    ".cache/{}.jpg": "hidden",
    "{}.txt": ".txt",
    "{}.json": ".json",
    "{}.PNG.part": ".part",
    "README{}": "no suffix",
}


@dataclass
class FolderTruth:
    """What must become of a folder's files, by their paths with PEP 383's surrogates."""

    samples: dict[str, AwkwardImage] = field(default_factory=dict[str, AwkwardImage])
    broken: dict[str, str] = field(default_factory=dict[str, str])  # why
    ignored: Counter[str] = field(default_factory=Counter[str])

    @property
    def num_files(self) -> int:
        """Return the number of all files."""
        return len(self.samples) + len(self.broken) + self.ignored.total()


class _Folder:
    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.truth = root, FolderTruth()
        self.random = np.random.default_rng([seed, 2])
        self.num_linked = 0

    def one(self, choices: tuple[str, ...]) -> str:
        return choices[int(self.random.integers(len(choices)))]

    def picture(self, path: str, image: AwkwardImage) -> None:
        """Write a picture under a path without suffix."""
        suffix = image.name.rpartition(".")[2]
        if suffix not in PACKED:
            self.truth.ignored[f".{suffix}"] += 1
        shown = suffix.upper() if self.random.random() < 0.1 else suffix
        whole = f"{path}.{shown}"
        if suffix in PACKED and image.expected is not None:
            self.truth.samples[whole] = image
        elif suffix in PACKED:
            self.truth.broken[whole] = image.why
        self.write(whole, image.content)

    def write(self, path: str, content: bytes = b"x") -> None:
        """Write a file, in one of three ways that are the same to a reader."""
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        way = self.random.random()
        if way < 0.9:
            place.write_bytes(content)
            return
        self.num_linked += 1
        stored = self.root.parent / "elsewhere" / str(self.num_linked)
        stored.write_bytes(content)
        if way < 0.95:
            place.symlink_to(stored)
        else:
            place.hardlink_to(stored)

    def beside(self, folder: str, number: int) -> None:
        """Write a file that is no picture, unless it is there."""
        name = self.one(tuple(BESIDE))
        path = f"{folder}/{name.format(number)}"
        if not (self.root / path).exists():
            self.truth.ignored[BESIDE[name]] += 1
            self.write(path)

    def dangling(self, folder: str, number: int) -> None:
        """A link that leads nowhere: left out by an option."""
        path = f"{folder}/dangling{number}.jpg"
        self.truth.broken[path] = "a link that leads nowhere"
        (self.root / path).symlink_to(self.root / "nowhere")


def write_folder(root: Path, seed: int, count: int) -> FolderTruth:
    """Write `count` awkward pictures with what stands beside them; return the truth."""
    (root.parent / "elsewhere").mkdir(parents=True)
    folder = _Folder(root, seed)
    for number, image in enumerate(make(seed, count)):
        place = folder.one(FOLDERS)
        stem = folder.one(STEMS).format(number)
        twin = folder.random.random() < 0.1
        folder.picture(f"{place}/{stem}", image)
        if twin:  # another file of the same stem
            other = make(seed + 1, number % 50 + 1)[-1]
            if other.name.rpartition(".")[2] != image.name.rpartition(".")[2]:
                folder.picture(f"{place}/{stem}", other)
        if folder.random.random() < 0.2:
            folder.beside(place, number)
        if folder.random.random() < 0.02:
            folder.dangling(place, number)
    return folder.truth
