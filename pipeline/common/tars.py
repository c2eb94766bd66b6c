"""Reproducible tars: the same samples in the same order always give the same bytes.

pack and the tar writer of the export write through here: ustar with fixed time, owner and mode. The
bytes are those of webdataset's own writer with the same settings. A name that is too long for ustar
(100 bytes, and 155 of its folders) stands in a PAX header before its member.
"""

import io
import os
import tarfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

OWNER = "root"
MODE = 0o444
SHORT_NAME_BYTES = 100  # always fits into a ustar header

# Writes one sample: its key and its members, suffix -> content.
WriteSample = Callable[[str, Mapping[str, bytes]], None]


@contextmanager
def open_tar(path: Path) -> Generator[WriteSample, None, None]:
    """Create `path` and yield a function that appends one sample's members, sorted by suffix.

    The file is flushed to the disk on a clean exit. After an error an incomplete file may remain:
    use a temporary name and publish afterwards.
    """
    with path.open("xb") as file:
        tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

        def write(key: str, members: Mapping[str, bytes]) -> None:
            for suffix in sorted(members):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(members[suffix])
                member.mode, member.uname, member.gname = MODE, OWNER, OWNER
                tar.format = tarfile.USTAR_FORMAT if _is_ustar(member) else tarfile.PAX_FORMAT
                tar.addfile(member, io.BytesIO(members[suffix]))

        yield write
        tar.close()  # not after an error: nothing more is to be written then
        file.flush()
        os.fsync(file.fileno())


def _is_ustar(member: tarfile.TarInfo) -> bool:
    """Tell whether a ustar header holds the member's name."""
    if len(member.name.encode(errors="surrogateescape")) <= SHORT_NAME_BYTES:
        return True
    try:
        member.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:
        return False
    return True
