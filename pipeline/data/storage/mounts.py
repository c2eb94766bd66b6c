"""Whether a path is on a disk of this machine or on a network file system.

/proc/self/mountinfo (proc(5)) --longest mount point above the path--> file system type
"""

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
# Every FUSE file system counts: nearly all of them (S3, GCS, SSH, Weka ...) ask a server.
NETWORKED = re.compile(
    r"(nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|orangefs|pvfs|panfs|afs|wekafs|9p|virtiofs|fuse)"
)
ESCAPED = re.compile(r"\\([0-7]{3})")  # such as a space in a mount point


def filesystem_type(path: str, mounts: str) -> str:
    """The file system type of an absolute path in a table of mounts; empty if there is none."""
    found, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = ESCAPED.sub(lambda match: chr(int(match[1], 8)), before.split()[4])
        holds = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two mounts on the same point, the later one is visible.
        if holds and len(point) >= longest:
            found, longest = after.split()[0], len(point)
    return found


def is_networked(path: str) -> bool:
    """Tell whether a path is on a network file system; False if the system does not say."""
    try:
        mounts = MOUNTS.read_text(errors="replace")
    except OSError:
        return False
    return NETWORKED.match(filesystem_type(os.path.realpath(path), mounts)) is not None
