"""Files that are either complete or absent: the primitives of pack, checkpoint and export.

A reader never sees half a file under its final name, and a name that was published survives a
power cut: content is written under a temporary name, flushed to the disk, and then renamed or
hard-linked into place, after which the directory itself is flushed.
"""

import hashlib
import json
import os
import tarfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

CHUNK_BYTES = 1 << 20


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


def check_member_name(name: str) -> None:
    """Raise UserError when a ustar header cannot hold the name (about 100 bytes per component)."""
    try:
        tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except (ValueError, UnicodeEncodeError) as error:
        raise UserError(
            f"{name!r} does not fit into a tar header ({error}): a file name may take 100 bytes "
            "and its folders another 155, in UTF-8. Rename the file."
        ) from error
