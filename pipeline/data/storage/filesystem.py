"""The fsspec file system behind a URL: listing, information, standard credentials."""

import os
from typing import Any

from fsspec.core import url_to_fs

from pipeline.common.errors import UserError

# Best first. "created" is the time of the content where files are replaced as a whole.
TAGS = ("ETag", "etag", "md5Hash", "generation", "checksum", "mtime", "LastModified", "created")


def open_filesystem(root: str, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it; raise UserError if it cannot be.

    Settings come from the environment variables and files of each library and from fsspec's own
    configuration; `options` override them.
    """
    try:
        filesystem, path = url_to_fs(root, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{root} cannot be opened: {error}. (s3: install latentmill[s3]; others: the package "
            "that fsspec names.)"
        ) from None
    return filesystem, path.rstrip("/")


class Filesystem:
    """The file system of a URL, usable after a fork: each process opens its own."""

    def __init__(self, root: str, **options: Any) -> None:
        """Open the file system, as `open_filesystem` does; `path`: the root's path in it."""
        self._root, self._options = root, options
        self._opened, self.path = open_filesystem(root, **options)
        self._pid = os.getpid()

    def __call__(self) -> Any:
        """Return the fsspec file system of this process."""
        if self._pid != os.getpid():
            self._opened, _ = open_filesystem(self._root, **self._options)
            self._pid = os.getpid()
        return self._opened


def tag_in(info: dict[str, Any]) -> str | None:
    """Return a tag that changes with the content, if the file system has one."""
    return next((str(info[name]) for name in TAGS if info.get(name) is not None), None)
