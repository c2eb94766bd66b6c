"""A writable directory, on a local disk or a network file system."""

import errno
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.files import (
    create_exclusive,
    publish,
    sync_directory,
    sync_file,
    temporary_name,
    write_atomic,
)
from pipeline.data.storage.writable import WritableStore

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalWritable(WritableStore):
    """The files below a directory."""

    exclusive_by = "hard links, which fail if the name exists"

    def put(self, name: str, content: bytes | Path) -> None:
        """Create or replace a file, flushed to the disk."""
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

    def create(self, name: str, content: bytes) -> bool:
        """Create a file by a hard link; raise UserError where the file system has none."""
        try:
            return create_exclusive(self._made(name), content)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            raise UserError(
                f"{self.root} lies on a file system without hard links ({error.strerror}), by "
                "which finished work is told from unfinished. Name a directory on another."
            ) from error

    def read(self, name: str) -> bytes | None:
        """Return all bytes of a file; None if there is none."""
        try:
            return self._path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        return self._path(name).is_file()

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return name -> bytes of all files below a folder; skip files removed meanwhile."""
        found: dict[str, int] = {}
        for path, _, names in os.walk(self._path(folder), onerror=_unless_missing):
            for name in names:
                file = Path(path, name)
                try:
                    found[file.relative_to(self.root).as_posix()] = file.stat().st_size
                except FileNotFoundError:
                    continue
        return dict(sorted(found.items()))

    def move(self, old: str, new: str) -> None:
        """Rename a file, replacing what is there."""
        final = self._made(new)
        os.replace(self._path(old), final)
        sync_directory(final.parent)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        self._path(name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with its files; other processes may do the same concurrently."""
        shutil.rmtree(self._path(folder), onerror=lambda _, __, error: _unless_missing(error[1]))

    @contextmanager
    def new_folder(self, folder: str) -> Generator[Path]:
        """Create the folder and flush it at the end; remove it after an error."""
        path = self._path(folder)
        path.mkdir(parents=True)
        try:
            yield path
            sync_directory(path)
            sync_directory(path.parent)
        except BaseException:
            self.delete_folder(folder)  # frees the space of a full disk
            raise

    @contextmanager
    def local_copy(self, names: Sequence[str]) -> Generator[Path]:
        """Provide the root itself."""
        del names
        yield Path(self.root)

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _made(self, name: str) -> Path:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _unless_missing(error: BaseException) -> None:
    """Raise an error of a walk through folders, unless files were removed meanwhile."""
    # A file was added meanwhile, or on NFS a removed file is still open in another process.
    in_use = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EBUSY)
    if not in_use and not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
