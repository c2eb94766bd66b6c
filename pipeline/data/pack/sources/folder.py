"""Folder: a tree of image files, where the first folder below the root is the class.

root/cats/img.001.jpg -> key `cats/img%2E001`, members `.jpg` (the file's bytes), `.cls` (0) and
`.json` ({"path": "cats/img.001.jpg", "class": "cats"}). Images directly in the root have no class;
images in both locations are an error. Files are copied byte for byte unless `resize` is set. Every
image is decoded once, so that broken ones are found here and not in the middle of a run.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.common.arguments import size
from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json, check_member_name
from pipeline.data.pack.sources.base import SUFFIXES, PackSource, Picture, Sample, require_positive


@dataclass(frozen=True)
class FoundFile:
    """An image file of the tree."""

    path: str  # relative to the root, with "/"
    num_bytes: int

    @property
    def key(self) -> str:
        """The sample's key: the path without suffix.

        webdataset splits a name at the first dot of its last component, so dots in it are
        escaped as in a URL, and so is "%", which keeps the escape reversible.
        """
        folder, slash, name = self.path.rpartition("/")
        stem = name.rpartition(".")[0]
        return folder + slash + stem.replace("%", "%25").replace(".", "%2E")

    @property
    def suffix(self) -> str:
        """The file's suffix in lower case, without the dot."""
        return self.path.rpartition(".")[2].lower()

    @property
    def class_name(self) -> str | None:
        """The first folder of the path, or None for a file directly in the root."""
        folder, slash, _ = self.path.partition("/")
        return folder if slash else None


@dataclass(frozen=True)
class FolderPart:
    """Some files of the tree, and what is needed to read them."""

    root: Path
    files: tuple[FoundFile, ...]
    labels: Mapping[str, int]
    resize: int | None

    def read(self) -> Iterator[Sample]:
        """Yield the samples in order; raises UserError when a file changed since it was listed."""
        for file in self.files:
            picture = Picture(file.path, file.suffix, self._bytes(file), self.resize)
            yield Sample(file.key, self._annotation(file), picture)

    def _bytes(self, file: FoundFile) -> bytes:
        try:
            data = (self.root / file.path).read_bytes()
        except OSError as error:
            raise UserError(f"{self.root / file.path} cannot be read: {error.strerror}.") from error
        if len(data) != file.num_bytes:
            raise UserError(
                f"{self.root / file.path} has {len(data)} bytes, but {file.num_bytes} when the "
                "folder was listed: leave the source alone while it is packed, then start again."
            )
        return data

    def _annotation(self, file: FoundFile) -> dict[str, bytes]:
        origin = {"path": file.path}
        if file.class_name is None:
            return {"json": json.dumps(origin).encode()}
        origin["class"] = file.class_name
        label = str(self.labels[file.class_name])
        return {"cls": label.encode(), "json": json.dumps(origin).encode()}


@dataclass(frozen=True)
class FolderSamples:
    """All image files below a folder, in packing order."""

    root: Path
    files: tuple[FoundFile, ...]
    classes: tuple[str, ...]  # sorted; empty when the images lie directly in the root
    ignored: Mapping[str, int]  # files that are no images we read: suffix (or "hidden") -> count
    resize: int | None
    shuffle_seed: int | None

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
            "resize": self.resize,
            "shuffle_seed": self.shuffle_seed,
            # Re-encoding depends on the encoder's release, a plain copy on nothing.
            "pillow": Image.__version__ if self.resize else None,
        }

    def sidecars(self) -> Mapping[str, bytes]:
        """Return `classes.json`, the names of the labels, if there are classes."""
        if not self.classes:
            return {}
        return {"classes.json": (json.dumps(self.classes) + "\n").encode()}

    def part(self, lo: int, hi: int) -> FolderPart:
        """Return files lo..hi-1."""
        labels = {name: label for label, name in enumerate(self.classes)}
        return FolderPart(self.root, self.files[lo:hi], labels, self.resize)


def list_folder(root: Path, *, resize: int | None, shuffle_seed: int | None) -> FolderSamples:
    """List the image files below `root`, sorted by path or permuted by `shuffle_seed`.

    Raises UserError when there are none, when only some lie in class folders, and when two files
    would get one key or a name does not fit into a tar.
    """
    if not root.is_dir():
        raise UserError(f"The source {root} is not a folder.")
    ignored: Counter[str] = Counter()
    files = sorted(_scan(root, ignored), key=lambda file: file.path)
    if not files:
        raise UserError(
            f"No image below {root}: looked for files that end in {', '.join(SUFFIXES)}."
        )
    _check_keys(files)
    classes = _classes(root, files)
    if shuffle_seed is not None:
        order = np.argsort(np.random.Philox(shuffle_seed).random_raw(len(files)), kind="stable")
        files = [files[number] for number in order]
    return FolderSamples(
        root.resolve(), tuple(files), classes, dict(sorted(ignored.items())), resize, shuffle_seed
    )


def _scan(root: Path, ignored: Counter[str]) -> Iterator[FoundFile]:
    """Yield the image files below `root` in no particular order; count the others."""
    for folder, names, sizes in _walk(root):
        for name, num_bytes in zip(names, sizes, strict=True):
            suffix = Path(name).suffix.lower().removeprefix(".")
            path = (folder / name).relative_to(root)
            if any(part.startswith(".") for part in path.parts):
                ignored["hidden"] += 1
            elif suffix not in SUFFIXES:
                ignored[f".{suffix}" if suffix else "no suffix"] += 1
            else:
                yield FoundFile(path.as_posix(), num_bytes)


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[int]]]:
    """Yield every folder with its files' names and sizes; linked folders are followed once."""
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            raise UserError(f"{folder} is a link to a folder that is listed already: remove it.")
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError as error:
            raise UserError(f"{folder} cannot be listed: {error.strerror}.") from error
        pending.extend(Path(entry.path) for entry in listed if entry.is_dir())
        plain = [entry for entry in listed if not entry.is_dir()]
        yield folder, [entry.name for entry in plain], [_size(entry) for entry in plain]


def _size(entry: os.DirEntry[str]) -> int:
    """Return the size in bytes; a dangling link counts as empty, and is then broken."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0


def _check_keys(files: Iterable[FoundFile]) -> None:
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        check_member_name(f"{file.key}.{file.suffix}")
        check_member_name(f"{file.key}.json")
        owners[file.key].append(file.path)
    clashes = [paths for paths in owners.values() if len(paths) > 1]
    if clashes:
        shown = "; ".join(" and ".join(paths) for paths in clashes[:10])
        raise UserError(
            f"{len(clashes)} key(s) would belong to more than one file, as a key is the path "
            f"without its suffix: {shown}{' ...' if len(clashes) > 10 else ''}. "
            "Rename or remove one of each."
        )


def _classes(root: Path, files: Sequence[FoundFile]) -> tuple[str, ...]:
    names = {file.class_name for file in files}
    if None in names and len(names) > 1:
        stray = next(file.path for file in files if file.class_name is None)
        raise UserError(
            f"Some images lie directly in {root} (such as {stray}) and others in class folders: "
            "move the former into a class folder, or pack a folder without sub-folders."
        )
    return tuple(sorted(name for name in names if name is not None))


class Folder(PackSource):
    """Settings of an image folder.

    resize: shorter side in pixels; None copies the files byte for byte. shuffle_seed: permutes the
    samples over the shards; None leaves them sorted by path.
    """

    HELP: ClassVar[str] = "an image folder; sub-folders are the classes"

    kind: Literal["folder"] = "folder"
    source: Path = Field(description="directory with the images")
    shard_bytes: Annotated[int, size] = Field(default=256 << 20, description="at most (256M)")
    shard_samples: int = Field(default=10_000, description="at most (%(default)s)")
    resize: int | None = Field(
        default=None,
        description="shorter side; else as it is",
        json_schema_extra={"metavar": "PIXELS"},
    )
    shuffle_seed: int | None = Field(
        default=None,
        description="else sorted by path",
        json_schema_extra={"metavar": "SEED"},
    )

    def open(self) -> FolderSamples:
        """List the images; raises UserError as `list_folder` does."""
        if self.resize is not None:
            require_positive(resize=self.resize)
        return list_folder(self.source, resize=self.resize, shuffle_seed=self.shuffle_seed)

    def check_out(self, out: Path) -> None:
        """Raise UserError if the shards would become files of the folder."""
        if out.resolve().is_relative_to(self.source.resolve()):
            raise UserError(
                f"The output {out} lies inside the source {self.source}: name another folder."
            )
