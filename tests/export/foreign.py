"""Shards as people have them: any members, written by Python's tarfile, and indexed."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.data.index import build_index
from tests.shards import png

Members = Mapping[str, bytes]  # file name -> content


def picture(number: int) -> bytes:
    """A grey picture of the size that the model of the tests takes."""
    return png(np.full((32, 32), number % 256, np.uint8))


def write_tar(path: Path, members: Members) -> None:
    """Write a tar as `tar` does, with PAX headers where names are long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, shards: Mapping[str, Members]) -> Path:
    """Write tars and their index, and return the folder."""
    for name, members in shards.items():
        write_tar(folder / name, members)
    build_index(folder)
    return folder


def members_of(path: Path) -> dict[str, bytes]:
    """All files of a tar by name, as Python's tarfile reads them."""
    with tarfile.open(path, "r:") as tar:
        return {m.name: file.read() for m in tar if (file := tar.extractfile(m)) is not None}
