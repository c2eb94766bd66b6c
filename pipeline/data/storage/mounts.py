"""What kind of file system a path lies on: a disk of this machine, or a server behind a network.

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
ESCAPED = re.compile(r"\\([0-7]{3})")  # a space and the like in a mount point


def filesystem_type(path: str, mounts: str) -> str:
    """The type that a table of mounts gives for an absolute path; empty if none holds it."""
    found, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = ESCAPED.sub(lambda match: chr(int(match[1], 8)), before.split()[4])
        holds = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two on the same point the later one lies on top.
        if holds and len(point) >= longest:
            found, longest = after.split()[0], len(point)
    return found


def is_networked(path: str) -> bool:
    """Tell whether reading there waits for a server; False where the system does not say."""
    try:
        mounts = MOUNTS.read_text(errors="replace")
    except OSError:
        return False
    return NETWORKED.match(filesystem_type(os.path.realpath(path), mounts)) is not None
