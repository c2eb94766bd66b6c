"""Folder: a tree of image files, where the first folder below the root is the class.

root/cats/img.001.jpg -> key `cats/img%2E001`, members `.jpg` (the file's bytes), `.cls` (0) and
`.json` ({"path": "cats/img.001.jpg", "class": "cats"}). Images directly in the root have no class.
Files are copied byte for byte unless `resize` is set. Every image is decoded once, so that broken
ones are found here and not in the middle of a run.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.common.console import named, printable
from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json
from pipeline.data.index.left_out import is_sidecar
from pipeline.data.pack.keys import keys_of, readable
from pipeline.data.pack.sources.base import (
    SUFFIXES,
    Broken,
    Picture,
    PictureSource,
    Sample,
    require_positive,
)


@dataclass(frozen=True)
class FoundFile:
    """A file of the tree, or a folder that cannot be listed."""

    path: str  # relative to the root, with "/"
    num_bytes: int
    fault: str = ""  # why it cannot be packed

    @property
    def suffix(self) -> str:
        """The file's suffix in lower case, without the dot."""
        stem, _, suffix = self.path.rpartition("/")[2].rpartition(".")
        return suffix.lower() if stem else ""

    @property
    def class_name(self) -> str | None:
        """The first folder of the path, or None for a file directly in the root."""
        folder, slash, _ = self.path.partition("/")
        return folder if slash else None


@dataclass(frozen=True)
class FolderPart:
    """Some files of the tree, and what is needed to read them."""

    root: Path
    files: tuple[tuple[str, FoundFile], ...]  # with their keys
    labels: Mapping[str, int]
    settings: "Folder"

    def read(self) -> Iterator[Sample | Broken]:
        """Yield the samples in order; raises UserError when a file changed since it was listed."""
        resize, max_pixels = self.settings.resize, self.settings.max_pixels
        for key, file in self.files:
            content = self._content(file)
            if isinstance(content, Broken):
                yield content
                continue
            picture = Picture(readable(file.path), file.suffix, content, resize, max_pixels)
            yield Sample(key, self._annotation(file), picture)

    def _content(self, file: FoundFile) -> bytes | Broken:
        name = readable(file.path)
        if file.fault:
            return Broken(name, file.fault)
        try:
            data = (self.root / file.path).read_bytes()
        except OSError as error:
            fault = f"cannot be read: {error.strerror}"
            if self.settings.leave_out:
                return Broken(name, fault)
            raise UserError(_refusal(self.root, [f"{name}: {fault}"])) from error
        if len(data) != file.num_bytes:
            raise UserError(
                f"{printable(name)} in {self.root} has {len(data)} bytes, but {file.num_bytes} "
                "when the folder was listed: leave the source alone while it is packed, then start "
                "again."
            )
        return data

    def _annotation(self, file: FoundFile) -> dict[str, bytes]:
        origin = {"path": readable(file.path)}
        if file.class_name is None:
            return {"json": json.dumps(origin).encode()}
        origin["class"] = readable(file.class_name)
        label = str(self.labels[file.class_name])
        return {"cls": label.encode(), "json": json.dumps(origin).encode()}


@dataclass(frozen=True)
class FolderSamples:
    """All image files below a folder, in packing order."""

    root: Path
    files: tuple[FoundFile, ...]
    keys: Mapping[str, str]  # of sound files, by their paths
    classes: tuple[str, ...]  # sorted; empty when the images lie directly in the root
    ignored: Mapping[str, int]  # files that are no images we read: kind or suffix -> count
    settings: "Folder"

    def __len__(self) -> int:
        return len(self.files)

    def sizes(self) -> Sequence[int]:
        """Return the files' sizes; a resized one counts with its original size."""
        return [file.num_bytes for file in self.files]

    def identity(self) -> Mapping[str, Any]:
        """Return the settings and a digest of names and sizes in packing order.

        A file with the same size counts as unchanged.
        """
        listing = [[file.path, file.num_bytes] for file in self.files]
        return {
            "kind": "folder",
            "version": 1,
            "files": len(self.files),
            "listing_sha256": sha256(canonical_json(listing)).hexdigest(),
            "shuffle_seed": self.settings.shuffle_seed,
            **self.settings.picture_identity(),
        }

    def sidecars(self) -> Mapping[str, bytes]:
        """Return `classes.json`, the names of the labels, if there are classes."""
        if not self.classes:
            return {}
        names = [readable(name) for name in self.classes]
        return {"classes.json": (json.dumps(names) + "\n").encode()}

    def part(self, lo: int, hi: int) -> FolderPart:
        """Return files lo..hi-1."""
        labels = {name: label for label, name in enumerate(self.classes)}
        files = tuple((self.keys.get(file.path, ""), file) for file in self.files[lo:hi])
        return FolderPart(self.root, files, labels, self.settings)


def _refusal(root: Path, faults: Sequence[str]) -> str:
    return (
        f"What lies below {root} cannot be packed whole, because of {len(faults):,}:\n"
        + "".join(f"  {printable(fault)}\n" for fault in faults)
        + "Mend or remove that, or pack the rest with --leave-out, which lists it in broken.jsonl."
    )


def _scan(root: Path, ignored: Counter[str]) -> Iterator[FoundFile]:
    """Yield the image files below `root`, and what has a fault; count the others."""
    for file in _walk(root):
        if is_sidecar(file.path):
            ignored["sidecar"] += 1
        elif any(name.startswith(".") for name in file.path.split("/")):
            ignored["hidden"] += 1
        elif file.suffix in SUFFIXES or file.fault:
            yield file
        else:
            ignored[f".{readable(file.suffix)}" if file.suffix else "no suffix"] += 1


def _walk(root: Path) -> Iterator[FoundFile]:
    """Yield every file below `root`, and every folder that cannot be listed, or is known already.

    Links to folders are followed after all else, in the sequence of their paths: so each folder is
    listed under its own path where it has one below the root.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        folder = folders.pop() if folders else heappop(links)
        try:
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                yield FoundFile(folder, 0, "a link to a folder that is listed already")
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                listed = list(entries)
        except OSError as error:
            yield FoundFile(folder, 0, f"a folder that cannot be listed: {error.strerror}")
            continue
        for entry in listed:
            path = f"{folder}/{entry.name}" if folder else entry.name
            file, is_folder = _look_at(entry, path)
            if not is_folder:
                yield file
            elif entry.is_symlink():
                heappush(links, path)
            else:
                folders.append(path)


def _look_at(entry: os.DirEntry[str], path: str) -> tuple[FoundFile, bool]:
    """Return what a folder holds, and whether that is a folder itself."""
    file = FoundFile(path, 0)
    may_be_meant = file.suffix in ("", *SUFFIXES)  # a picture, or a folder of them
    fault = ""
    try:
        status = entry.stat()
    except OSError as error:
        what = "a link that leads nowhere" if entry.is_symlink() else "cannot be read"
        return FoundFile(path, 0, f"{what}: {error.strerror}" if may_be_meant else ""), False
    if stat.S_ISDIR(status.st_mode):
        return file, True
    if file.suffix in SUFFIXES:
        if not stat.S_ISREG(status.st_mode):
            fault = "no plain file"
        elif not os.access(entry.path, os.R_OK, effective_ids=True):
            fault = "may not be read by this user"
    return FoundFile(path, 0 if fault else status.st_size, fault), False


class Folder(PictureSource):
    """Settings of an image folder.

    shuffle_seed: permutes the samples over the shards; None leaves them sorted by path.
    """

    HELP: ClassVar[str] = "an image folder; sub-folders are the classes"

    kind: Literal["folder"] = "folder"
    source: Path = Field(description="directory with the images")
    shuffle_seed: int | None = Field(
        default=None,
        description="else sorted by path",
        json_schema_extra={"metavar": "SEED"},
    )
    leave_out: bool = Field(
        default=False, description="leave out what cannot be read, and list it in broken.jsonl"
    )

    def open(self) -> FolderSamples:
        """List the images, sorted by path or permuted.

        Raises UserError when there are none, and for what cannot be read unless it may be left out.
        """
        require_positive(resize=self.resize, max_pixels=self.max_pixels)
        if not self.source.is_dir():
            raise UserError(
                f"The source {self.source} is not a folder, and no kind of source that `latentmill "
                "pack --help` lists."
            )
        ignored: Counter[str] = Counter()
        files = sorted(_scan(self.source, ignored), key=lambda file: file.path)
        faults = [f"{readable(file.path) or '.'}: {file.fault}" for file in files if file.fault]
        if faults and not self.leave_out:
            raise UserError(_refusal(self.source, faults))
        sound = [file for file in files if not file.fault]
        if not sound:
            there = f" There are: {printable(named(ignored))}." if ignored else ""
            raise UserError(
                f"No image below {self.source}: looked for files that end in "
                f"{', '.join(SUFFIXES)}.{there}"
            )
        names = {file.class_name for file in sound} - {None}
        if self.shuffle_seed is not None:
            raw = np.random.Philox(self.shuffle_seed).random_raw(len(files))
            files = [files[number] for number in np.argsort(raw, kind="stable")]
        return FolderSamples(
            self.source.resolve(),
            tuple(files),
            keys_of([file.path for file in sound]),
            tuple(sorted(name for name in names if name is not None)),
            dict(sorted(ignored.items())),
            self,
        )
