"""Tars as people have them, with what must become of each of their members.

    seed, count -> pictures, labels, texts, JSON, links, sidecars, names: the truth
                -> the tar, written by Python's tarfile in one of its three dialects

The truth is written down while the members are made, before any of our code sees them.
"""

import io
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.data.awkward_images import AwkwardImage, make

DIALECTS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LABELS = {
    b"7": None,
    b" 12\n": None,
    b"-9223372036854775808": None,
    b"cat": "label_not_integer",
    b"3.0": "label_not_integer",
    b"": "label_not_integer",
    b"9223372036854775808": "label_not_integer",
    b"-1": "label_minus_one",
}
TEXTS = {
    "ein Bär".encode(): None,
    b"": None,
    b"\xef\xbb\xbfwith a mark": None,
    "café".encode("latin-1"): "text_not_utf8",
    "日本".encode("utf-16"): "text_not_utf8",
    "図".encode("shift-jis"): "text_not_utf8",
}
RECORDS = {
    b'{"a": 1}': None,
    b"[]": None,
    b"": "json_invalid",
    b"{'a': 1}": "json_invalid",
    b'{"a": 1': "json_invalid",
    b'{"a": "\xe9"}': "json_invalid",
}
SIDECARS = (
    *("._{}", "__MACOSX/{}", "__MACOSX/._{}", ".DS_Store", "Thumbs.db", "desktop.ini"),
    *(".AppleDouble/{}", "@eaDir/{}"),
)


@dataclass
class Truth:
    """What must become of a tar: its samples in sequence, and how many members of each reason.

    A reason of a member that is delivered all the same stands in `kept`, any other in `left_out`.
    """

    num_members: int = 0
    samples: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter[str])
    kept: Counter[str] = field(default_factory=Counter[str])
    images: dict[str, AwkwardImage] = field(default_factory=dict[str, AwkwardImage])  # by key
    labels: dict[str, int] = field(default_factory=dict[str, int])  # by key


class AwkwardTar:
    """Writes a tar, and the truth about it."""

    def __init__(self, path: Path, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 1])
        dialect = DIALECTS[int(self._rng.integers(3))]
        self._is_plain = dialect == tarfile.USTAR_FORMAT  # short names only
        self._tar = tarfile.open(path, "w", format=dialect, errors="surrogateescape")  # noqa: SIM115
        self._files: dict[str, bytes] = {}
        self.truth = Truth()

    def _one(self, choices: tuple[str, ...] | list[bytes]) -> str | bytes:
        return choices[int(self._rng.integers(len(choices)))]

    def _entry(self, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(content)
        self._tar.addfile(info, io.BytesIO(content))
        self.truth.num_members += kind != tarfile.DIRTYPE

    def _link(self, name: str, target: str, kind: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        self._tar.addfile(info)
        self.truth.num_members += 1

    def _member(self, key: str, suffix: str, content: bytes) -> None:
        """Write a member of a sample."""
        self._entry(f"{key}.{suffix}", content)
        self._deliver(key, suffix, content)

    def _deliver(self, key: str, suffix: str, content: bytes) -> None:
        self._files[f"{key}.{suffix}"] = content
        samples, suffix = self.truth.samples, suffix.lower()
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][suffix] = content

    def _left_out(self, reason: str, name: str, content: bytes = b"x") -> None:
        self._entry(name, content)
        self.truth.left_out[reason] += 1

    def add(self, number: int, image: AwkwardImage) -> None:
        """Add a picture in one of the ways that people have, with what may stand beside it."""
        folder = str(self._one(("", "./", "cats/", "./a b/ü/", "v1.0/")))
        key = f"{folder}{number:05d}"
        suffix = image.name.rpartition(".")[2]
        way = int(self._rng.integers(12))
        if way == 0:
            self._left_out("dunder_name", f"__background__/{number}.png", image.content)
            return
        if way == 1:
            key = f"{folder}IMG_{number}"
            suffix = f"{number:05d}.{suffix}"
            self.truth.kept["dotted_suffix"] += 1
        elif way == 2 and not self._is_plain:
            key = f"{folder}{'long' * 80}{number}"
        self._picture(key, suffix, image)
        self._beside(key, folder, number)

    def _picture(self, key: str, suffix: str, image: AwkwardImage) -> None:
        shown = suffix.upper() if self._rng.random() < 0.1 else suffix
        self._member(key, shown, image.content)
        self.truth.images[key] = image

    def _beside(self, key: str, folder: str, number: int) -> None:
        """Add further members of the sample, and members of none between them."""
        for suffix, contents in (("cls", LABELS), ("txt", TEXTS), ("json", RECORDS)):
            if self._rng.random() < 0.3:
                sidecar = str(self._one(SIDECARS)).format(f"{number}.{suffix}")
                self._left_out("sidecar", f"{folder}{sidecar}")
            if self._rng.random() < 0.5:
                content = bytes(self._one(list(contents)))
                self._member(key, suffix, content)
                if (reason := contents[content]) is not None:
                    self.truth.kept[reason] += 1
                elif suffix == "cls":
                    self.truth.labels[key] = int(content)
        self._odd(folder, number)

    def _odd(self, folder: str, number: int) -> None:
        """Add what is no file, or a link to one."""
        way = int(self._rng.integers(14))
        if way == 0:
            self._link(f"{folder}soft{number}.png", f"{number}.png", tarfile.SYMTYPE)
            self.truth.left_out["symbolic_link"] += 1
        elif way == 1:
            name = str(self._one(tuple(self._files)))
            self._link(f"{folder}hard{number}.bin", name, tarfile.LNKTYPE)
            self._deliver(f"{folder}hard{number}", "bin", self._files[name])
        elif way == 2:
            self._link(f"{folder}lost{number}.bin", f"{folder}later{number}.bin", tarfile.LNKTYPE)
            self.truth.left_out["hard_link"] += 1
            self._member(f"{folder}later{number}", "bin", b"later")
        elif way == 3:
            self._left_out("no_suffix", f"{folder}README")
        elif way == 4:
            self._left_out("no_suffix", f"{folder}.hidden{number}.png")
        elif way == 5:
            kind = tarfile.FIFOTYPE if self._rng.random() < 0.5 else tarfile.CHRTYPE
            self._entry(f"{folder}pipe{number}.png", kind=kind)
            self.truth.left_out["special"] += 1
        elif way == 6:
            self._entry(f"{folder}sub{number}", kind=tarfile.DIRTYPE)
        elif way == 7:
            self._left_out("metadata", f"__meta{number}__")

    def close(self) -> Truth:
        """Finish the tar; return the truth."""
        self._tar.close()
        return self.truth


def write_tar(path: Path, seed: int, count: int) -> Truth:
    """Write a tar of `count` awkward pictures with what stands beside them; return the truth."""
    tar = AwkwardTar(path, seed)
    for number, image in enumerate(make(seed, count)):
        tar.add(number, image)
    return tar.close()
