"""The fsspec file system behind a URL: listing, information, credentials from the usual places."""

from typing import Any

from fsspec.core import url_to_fs

from pipeline.errors import UserError

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


def tag_in(info: dict[str, Any]) -> str | None:
    """What changes with the content, as far as a file system tells it."""
    return next((str(info[name]) for name in TAGS if info.get(name) is not None), None)
