"""A writable fsspec store: S3 with exclusive creation, others without.

Retries and waits are those of the library (s3fs: 5 attempts with back-off), which also finds
credentials and endpoint.
"""

import errno
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pipeline.common.errors import StoreError, UserError
from pipeline.data.storage.filesystem import open_filesystem
from pipeline.data.storage.threads import map_in_threads
from pipeline.data.storage.writable import WritableStore

TRANSFERS = 8  # concurrent transfers of one folder
# Errors that a retry cannot solve.
PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError, ValueError)

Result = TypeVar("Result")


class RemoteWritable(WritableStore):
    """The files below a URL.

    appears_whole: an object exists only after a complete upload, so it needs no temporary name.
    has_create: the store can create objects exclusively.
    """

    def __init__(self, root: str, *, appears_whole: bool, has_create: bool) -> None:
        super().__init__(root.rstrip("/"))
        self.exclusive_by = "`If-None-Match: *`, which fails if the object exists"
        if not has_create:
            self.exclusive_by = ""
        self._appears_whole = appears_whole
        # No cache of listings: files of other writers must be seen.
        self._files, self._path = open_filesystem(root, use_listings_cache=False)

    def put(self, name: str, content: bytes | Path) -> None:
        """Create or replace a file."""
        final = self._full(name)
        target = final if self._appears_whole else f"{final}.tmp-{uuid.uuid4().hex[:12]}"

        def write() -> None:
            if not self._appears_whole:
                self._files.makedirs(final.rpartition("/")[0], exist_ok=True)
            if isinstance(content, bytes):
                self._files.pipe_file(target, content)
            else:
                self._files.put_file(str(content), target)
            if target != final:
                self._files.mv(target, final)

        self._do(name, "written", write)

    def create(self, name: str, content: bytes) -> bool:
        """Create an object unless there is one."""
        assert self.exclusive_by, "check_exclusive refuses stores without the primitive"

        def write() -> bool:
            try:
                self._files.pipe_file(self._full(name), content, mode="create")
            except FileExistsError:
                # This call created it if the response to an earlier attempt was lost.
                return self.read(name) == content
            return True

        return self._do(name, "created", write)

    def read(self, name: str) -> bytes | None:
        """Return all bytes of a file; None if there is none."""

        def get() -> bytes | None:
            try:
                return self._files.cat_file(self._full(name))
            except FileNotFoundError:
                return None

        return self._do(name, "read", get)

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""

        def look() -> bool:  # `isfile` would return False after an error
            try:
                return self._files.info(self._full(name))["type"] == "file"
            except FileNotFoundError:
                return False

        return self._do(name, "read", look)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return name -> bytes of all files below a folder, by one listing."""
        top = self._full(folder) if folder else self._path
        found = self._do(folder, "listed", lambda: self._files.find(top, detail=True))
        start = len(self._path) + 1
        files = {path: info["size"] for path, info in found.items() if info["type"] == "file"}
        return {path[start:]: files[path] for path in sorted(files)}

    def move(self, old: str, new: str) -> None:
        """Copy a file within the store and remove the old one."""

        def copy() -> bool:
            try:
                self._files.cp_file(self._full(old), self._full(new))
            except FileNotFoundError:  # moved by another process, or it never existed
                return False
            return True

        if not self._do(new, "written", copy):
            raise FileNotFoundError(self.where(old))
        self.delete(old)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""

        def remove() -> None:
            try:
                self._files.rm_file(self._full(name))
            except FileNotFoundError:
                return

        self._do(name, "removed", remove)

    def delete_folder(self, folder: str) -> None:
        """Remove all files below a folder."""
        map_in_threads(self.delete, list(self.sizes(folder)), TRANSFERS)

    @contextmanager
    def new_folder(self, folder: str) -> Generator[Path]:
        """Provide a temporary directory and upload its files at the end."""
        with TemporaryDirectory(prefix="latentmill-") as scratch:
            root = Path(scratch)
            try:
                yield root
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(
                    f"{scratch} is full, where files for {self.root} are written before upload: "
                    "set the environment variable TMPDIR to a directory with more room."
                ) from error
            files = sorted(path for path in root.rglob("*") if path.is_file())

            def upload(path: Path) -> None:
                self.put(f"{folder}/{path.relative_to(root).as_posix()}", path)

            map_in_threads(upload, files, TRANSFERS)

    @contextmanager
    def local_copy(self, names: Sequence[str]) -> Generator[Path]:
        """Download the files into a temporary directory."""
        with TemporaryDirectory(prefix="latentmill-") as scratch:

            def download(name: str) -> None:
                path = Path(scratch, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if self.exists(name):
                    self._do(name, "read", lambda: self._files.get_file(self._full(name), path))

            map_in_threads(download, names, TRANSFERS)
            yield Path(scratch)

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _do(self, name: str, what: str, work: Callable[[], Result]) -> Result:
        """Call the library and turn its errors into ours, with the file's name."""
        try:
            return work()
        except (UserError, StoreError):
            raise
        except PERMANENT as error:
            raise UserError(self._text(name, what, error)) from error
        except Exception as error:
            raise StoreError(
                f"{self._text(name, what, error)} The same command goes on where it stopped."
            ) from error

    def _text(self, name: str, what: str, error: Any) -> str:
        return f"{self.where(name)} cannot be {what} ({type(error).__name__}: {error})."
