"""Open the store of a root, for reading or for writing."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec

from pipeline.common.errors import UserError
from pipeline.common.files import why_no_path
from pipeline.data.storage.base import Storage
from pipeline.data.storage.generic import GenericStorage
from pipeline.data.storage.http import HttpStorage
from pipeline.data.storage.local import LocalStorage
from pipeline.data.storage.policy import RemotePolicy
from pipeline.data.storage.s3 import S3Storage
from pipeline.data.storage.writable import WritableStore
from pipeline.data.storage.writable_local import LocalWritable
from pipeline.data.storage.writable_remote import RemoteWritable

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
HTTP = frozenset(("http", "https"))
S3 = frozenset(("s3", "s3a"))
LOCAL = frozenset(("", "file", "local"))
# Stores in which an object appears at once when its upload is complete.
OBJECT_STORES = S3 | {"gs", "gcs", "az", "abfs", "adl", "oss", "oci", "tos"}


def scheme_of(location: str | Path) -> str:
    """The part before the first colon of a URL; empty for a local path."""
    match = SCHEME.match(str(location))
    return match[1].lower() if match else ""


def is_url(location: str | Path) -> bool:
    """Tell whether a location names a store other than the local file systems."""
    return scheme_of(location) not in LOCAL


def local_path(location: str | Path) -> str:
    """Return a local location as a path, without `file://`; UserError if it names no path."""
    text = str(location)
    if scheme_of(text):
        return unquote(urlsplit(text).path)
    if reason := why_no_path(text):
        raise UserError(f"The path {text!r} {reason}.")
    return text


def open_storage(root: str | Path, remote: RemotePolicy | None = None) -> Storage:
    """Return the store of the shards below `root`, a directory or a URL; raise UserError.

    `remote`: attempts, limits and connections for URLs; None = the defaults.
    """
    text, policy = str(root), remote or RemotePolicy()
    scheme = scheme_of(text)
    if scheme in LOCAL:
        return LocalStorage(local_path(text))
    check_scheme(text)
    if scheme in HTTP:
        return HttpStorage(text, policy)
    if scheme in S3:
        return S3Storage(text, policy)
    return GenericStorage(text, policy)


def open_writable(root: str | Path) -> WritableStore:
    """Return the writer for a directory or URL; raise UserError where nothing can be written."""
    text = str(root)
    scheme = scheme_of(text)
    if scheme in LOCAL:
        return LocalWritable(local_path(text))
    if scheme in HTTP:
        raise UserError(
            f"{text} is read only: HTTP has no way to write files; set out or --out to another."
        )
    check_scheme(text)
    return RemoteWritable(text, appears_whole=scheme in OBJECT_STORES, has_create=scheme in S3)


def check_scheme(location: str) -> None:
    """Raise UserError unless the location's scheme can be read."""
    scheme = scheme_of(location)
    known = sorted({*HTTP, *S3, *fsspec.available_protocols()})
    if scheme not in known or "://" not in location:
        raise UserError(
            f"{location}: the scheme {scheme!r} is unknown. Shards are read from local "
            f"paths and from URLs of {', '.join(f'{name}://' for name in known)}; commands "
            "(pipe:) are never run."
        )
