"""The interface of writable stores: files are written completely or not at all.

    bytes or a local file --put--> local: temporary name, flushed, renamed
                                   object stores: one upload, which appears when complete
                                   others of fsspec: temporary name, then moved
    bytes --create--> the same, unless the name exists: exactly one of several writers succeeds
                      local: a hard link; S3: `If-None-Match: *`; others have no such primitive

HTTP is read only. Readers never see half a file under its final name.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.common.errors import UserError


class WritableStore(ABC):
    """The files below one root; names are relative, with slashes; folders are created as needed.

    Methods raise UserError if the store cannot be used at all (no bucket, no permission), and
    StoreError (remote) or OSError (local) for temporary failures.
    """

    exclusive_by: str  # the primitive behind `create`, in words; empty = there is none

    def __init__(self, root: str) -> None:
        self.root = root

    def where(self, name: str) -> str:
        """Return the full path or URL of a file, for messages."""
        return f"{self.root}/{name}"

    @abstractmethod
    def put(self, name: str, content: bytes | Path) -> None:
        """Create or replace a file by some bytes, or by a copy of a local file."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Create a file unless it exists; return whether this call created it.

        `content` must identify its writer: if the response to a first attempt was lost, the retry
        finds the file, and equal content means that this call created it.
        """

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return all bytes of a file; None if there is none."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return name -> bytes of all files below a folder, sorted by name; "" = below the root."""

    @abstractmethod
    def move(self, old: str, new: str) -> None:
        """Give a file another name, replacing what is there; FileNotFoundError if it is gone."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove all files below a folder; nothing happens if there are none."""

    @abstractmethod
    def new_folder(self, folder: str) -> AbstractContextManager[Path]:
        """Provide a local directory, whose files are stored in `folder` at the end, flushed.

        After an error nothing is stored. FileNotFoundError: `folder` was removed meanwhile.
        """

    @abstractmethod
    def local_copy(self, names: Sequence[str]) -> AbstractContextManager[Path]:
        """Provide a local directory with at least those of the named files that exist."""

    def check_exclusive(self, folder: str) -> str:
        """Try `create` on a file below `folder`, twice at once and once more.

        Returns the primitive that it uses. Raises UserError if two calls can create the same name.
        """
        name = f"{folder}/probe-{uuid.uuid4().hex[:12]}"
        wins = [False, False, False]
        try:
            if self.exclusive_by:
                with ThreadPoolExecutor(2) as racers:
                    wins[:2] = racers.map(lambda who: self.create(name, who), (b"one", b"two"))
                wins[2] = self.create(name, b"three")
            stays = self.read(name) == (b"one" if wins[0] else b"two")
        finally:
            self.delete(name)
        if sum(wins) == 1 and not wins[2] and stays:
            return self.exclusive_by
        raise UserError(
            f"{self.root} offers no way to create a file only if it does not exist, so two "
            "processes could both believe that they had finished the same work. Name a directory "
            "on a file system with hard links, or an s3:// URL whose store honours "
            "`If-None-Match: *` (AWS, GCS by its S3 endpoint, R2, MinIO)."
        )
