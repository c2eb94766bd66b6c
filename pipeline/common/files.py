"""Files that are either complete or absent: the primitives of pack, checkpoint and export.

A reader never sees half a file under its final name, and a name that was published survives a
power cut: content is written under a temporary name, flushed to the disk, and then renamed or
hard-linked into place, after which the directory itself is flushed.
"""

import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.common.errors import UserError

CHUNK_BYTES = 1 << 20
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(/?)")  # `Path` makes s3:/ of s3://
_UNEXPANDED = re.compile(r"~|.*\$[{\w]")


def why_no_path(text: str | Path) -> str:
    """Why a text, taken as written, names no path of this machine; empty if it names one.

    A URL, `~` and `$NAME` would silently become folders of these names. One that is there already
    may be meant.
    """
    place = str(text)
    if not place.strip() or "\0" in place:
        return "must name a directory"
    if (url := _URL.match(place)) and (url[2] or _mode(place) is None):
        if url[1].lower() == "file":
            return f"must be written without file://, as {unquote(urlsplit(place).path)}"
        return (
            "must be a path of this machine or of a mounted file system, not a URL: mount that "
            "store, or copy the files; only data sets and exports may lie behind URLs"
        )
    if _UNEXPANDED.match(place) and _mode(place) is None:
        # `Path` raises an error for an unknown user.
        whole = os.path.expandvars(os.path.expanduser(place))  # noqa: PTH111
        example = "" if whole == place else f", as {whole}"
        return f"must be written out{example}: only a shell expands ~ and $NAME"
    return ""


def why_no_directory(text: str | Path) -> str:
    """Why a text names no directory that is there or can be made; empty if it names one."""
    if reason := why_no_path(text):
        return reason
    there = ((path, _mode(path)) for path in (Path(text), *Path(text).parents))
    nearest = next(((path, mode) for path, mode in there if mode is not None), None)
    if nearest is None or stat.S_ISDIR(nearest[1]):
        return ""
    return f"must be a directory, and {nearest[0]} is a file"


def _mode(path: str | Path) -> int | None:
    """The type of what is there, as `stat` tells it; None if it is not there, or out of reach."""
    try:
        return Path(path).stat().st_mode
    except OSError:
        return None


def local_directory(text: str | Path, what: str) -> Path:
    """The directory that a setting or argument, called `what`, names where no URL works.

    Raises UserError if it names none.
    """
    if reason := why_no_directory(text):
        raise UserError(f"{what} is {str(text)!r}, but {reason}.")
    return Path(text)


def sha256_file(path: Path) -> str:
    """Hex digest of the file's content, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The canonical bytes of `value` for hashes: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sync_file(path: Path) -> None:
    """Flush a closed file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """An unused name beside `path`, recognisable as temporary by its infix `.tmp-`."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")


def _write_temporary(path: Path, data: bytes) -> Path:
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_atomic(path: Path, data: bytes) -> None:
    """Replace or create `path` with `data`; after a crash it holds the old content or the new."""
    temporary = _write_temporary(path, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_atomic` of readable JSON with sorted keys."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, text.encode())


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; tell whether this call created it.

    The hard link is atomic: exactly one of several concurrent callers succeeds, and no reader sees
    a partial file (works on local disks, NFS, Lustre).
    """
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS repeats a request whose reply was lost, and the repeated link fails.
        if not _is_link(temporary, path):
            return False
    finally:
        temporary.unlink()
    sync_directory(path.parent)
    return True


def _is_link(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:  # deleted meanwhile
        return False


def publish(staged: Path, final: Path) -> None:
    """Move a complete, flushed file or directory to its final name."""
    os.rename(staged, final)
    sync_directory(final.parent)
