"""Writing files beside shards, whole or not at all, in any store that can be written.

    bytes or a local file --Publisher.put--> local: temporary name, flushed, renamed
                                             object stores: one upload, which appears when complete
                                             others of fsspec: temporary name, then moved

HTTP is read only. Readers never see half a file under its final name.
"""

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from pathlib import Path

from pipeline.data.storage.filesystem import open_filesystem
from pipeline.data.storage.opening import HTTP, LOCAL, check_scheme, local_path, scheme_of
from pipeline.errors import UserError
from pipeline.files import publish, sync_file, temporary_name, write_atomic

# Stores in which an object appears at once when its upload is complete.
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "oss", "oci", "tos"))


class Publisher(ABC):
    """The files below one root that can be written; names are relative, with slashes."""

    def __init__(self, root: str) -> None:
        self.root = root

    @abstractmethod
    def put(self, name: str, content: bytes | Path) -> None:
        """Create or replace a file by some bytes, or by a copy of a local file."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""

    @abstractmethod
    def move(self, old: str, new: str) -> None:
        """Give a file another name below the same root, replacing what is there."""


class _LocalPublisher(Publisher):
    def put(self, name: str, content: bytes | Path) -> None:
        path = self._made(name)
        if isinstance(content, bytes):
            write_atomic(path, content)
            return
        temporary = temporary_name(path)
        try:
            shutil.copyfile(content, temporary)
            sync_file(temporary)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        return (Path(self.root) / name).is_file()

    def delete(self, name: str) -> None:
        (Path(self.root) / name).unlink(missing_ok=True)

    def move(self, old: str, new: str) -> None:
        os.replace(Path(self.root) / old, self._made(new))

    def _made(self, name: str) -> Path:
        path = Path(self.root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _RemotePublisher(Publisher):
    def __init__(self, root: str) -> None:
        super().__init__(root.rstrip("/"))
        self._files, self._path = open_filesystem(root)
        self._is_object_store = scheme_of(root) in OBJECT_STORES

    def put(self, name: str, content: bytes | Path) -> None:
        final = f"{self._path}/{name}"
        place = final if self._is_object_store else f"{final}.tmp-{uuid.uuid4().hex[:12]}"
        try:
            if not self._is_object_store:
                self._files.makedirs(final.rpartition("/")[0], exist_ok=True)
            if isinstance(content, bytes):
                self._files.pipe_file(place, content)
            else:
                self._files.put_file(str(content), place)
            if place != final:
                self._files.mv(place, final)
        except Exception as error:  # every library has errors of its own
            raise UserError(
                f"{self.root}/{name} cannot be written ({type(error).__name__}: {error})."
            ) from error

    def exists(self, name: str) -> bool:
        self._files.invalidate_cache()
        return bool(self._files.isfile(f"{self._path}/{name}"))

    def delete(self, name: str) -> None:
        try:
            self._files.rm_file(f"{self._path}/{name}")
        except FileNotFoundError:
            return

    def move(self, old: str, new: str) -> None:
        self._files.mv(f"{self._path}/{old}", f"{self._path}/{new}")


def open_publisher(root: str | Path) -> Publisher:
    """Return the writer for a directory or URL; raise UserError where nothing can be written."""
    text = str(root)
    scheme = scheme_of(text)
    if scheme in LOCAL:
        return _LocalPublisher(local_path(text))
    if scheme in HTTP:
        raise UserError(f"{text} is read only: HTTP has no way to write files; name another --out.")
    check_scheme(text)
    return _RemotePublisher(text)
