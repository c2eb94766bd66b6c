"""The fsspec file system behind a URL: listing, information, credentials from the usual places."""

import os
from typing import Any

from fsspec.core import url_to_fs

from pipeline.common.errors import UserError

# Best first; of the times, "created" is that of the content where files are replaced as a whole.
TAGS = ("ETag", "etag", "md5Hash", "generation", "checksum", "mtime", "LastModified", "created")


def open_filesystem(root: str, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it; raise UserError if it cannot be.

    Settings come from where each library looks for them: its environment variables, its files and
    fsspec's own configuration; `options` come before these.
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
    """A URL's file system for as long as a store needs it, in forked processes, too.

    A forked process cannot use what its parent opened: it opens its own.
    """

    def __init__(self, root: str, **options: Any) -> None:
        """Open it; raises UserError as `open_filesystem` does. `path`: in it, of the root."""
        self._root, self._options = root, options
        self._opened, self.path = open_filesystem(root, **options)
        self._pid = os.getpid()

    def __call__(self) -> Any:
        """Return it, as fsspec has it."""
        if self._pid != os.getpid():
            self._opened, _ = open_filesystem(self._root, **self._options)
            self._pid = os.getpid()
        return self._opened


def tag_in(info: dict[str, Any]) -> str | None:
    """What changes with the content, as far as a file system tells it."""
    return next((str(info[name]) for name in TAGS if info.get(name) is not None), None)
