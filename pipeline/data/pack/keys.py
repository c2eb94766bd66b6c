"""Names of files -> keys that every reader of webdataset tars takes for one sample each.

`a/b.c` -> `a/b%2Ec`, since webdataset ends a key at the first dot of the last component. The
escapes are those of URLs: `urllib.parse.unquote_to_bytes` gives the bytes of the name back. Names
with nothing to escape stay as they are.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

# A byte that is not UTF-8, as Python reads it from a file system (PEP 383).
FOREIGN = re.compile("[\udc80-\udcff]")
# The first folder `__x__` stands for metadata by webdataset's rule.
METADATA = re.compile("_(?=_[^/]*__/)")


def _escape(character: str) -> str:
    return f"%{ord(character) & 0xFF:02X}"


def readable(name: str) -> str:
    """Return a file's name as text: bytes that are not UTF-8 as %XX, and then % as %25."""
    if not FOREIGN.search(name):
        return name
    return FOREIGN.sub(lambda found: _escape(found[0]), name.replace("%", "%25"))


def key_of(name: str) -> str:
    """The key of a sample that is to be called `name`, which may contain folders."""
    folder, slash, base = name.rpartition("/")
    # In folders only a % that would be read as an escape is one.
    key = re.sub("%(?=[0-9A-Fa-f]{2})", "%25", folder) + slash
    key += base.replace("%", "%25").replace(".", "%2E")
    key = re.sub("[\udc80-\udcff\n\0]", lambda found: _escape(found[0]), key)
    return f"%5F{key[1:]}" if METADATA.match(key) else key


def keys_of(paths: Sequence[str]) -> dict[str, str]:
    """Return path -> key of files: their paths without suffix; with it where two would be alike."""
    with_suffix: set[str] = set()
    while True:
        owners: defaultdict[str, list[str]] = defaultdict(list)
        for path in paths:
            name = path if path in with_suffix else path.rpartition(".")[0]
            owners[key_of(name)].append(path)
        twins = {path for found in owners.values() if len(found) > 1 for path in found}
        if not twins:
            return {found[0]: key for key, found in owners.items()}
        with_suffix |= twins
