"""Reproducible tars: the same samples in the same order always give the same bytes.

Used by pack and by the tar writer of the export. The container is webdataset's own `TarWriter`,
set to ustar with fixed time, owner and mode; tarfile's default would be PAX.
"""

import os
import tarfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from webdataset.writer import TarWriter

OWNER = "root"
MODE = 0o444

# Writes one sample: its key and its members, suffix -> content.
WriteSample = Callable[[str, Mapping[str, bytes]], None]


@contextmanager
def open_tar(path: Path) -> Generator[WriteSample, None, None]:
    """Create `path` and yield a function that appends one sample's members, sorted by suffix.

    The file is flushed to the disk on a clean exit. After an error an incomplete file may remain:
    use a temporary name and publish afterwards.
    """
    with path.open("xb") as file:
        # mtime=0 is an integer: a float would be written as a PAX record.
        writer = TarWriter(
            file, user=OWNER, group=OWNER, mode=MODE, compress=False, encoder=False, mtime=0
        )
        # TarWriter accepts `format` but does not hand it to tarfile (webdataset 1.0.2).
        writer.tarstream.format = tarfile.USTAR_FORMAT

        def write(key: str, members: Mapping[str, bytes]) -> None:
            writer.write({"__key__": key, **members})

        try:
            yield write
            writer.close()
        except BaseException:
            # Otherwise its destructor would write buffered data into the closed file.
            writer.tarstream.fileobj.closed = True  # pyright: ignore[reportAttributeAccessIssue]
            raise
        file.flush()
        os.fsync(file.fileno())
