"""Compare a shard as Python's tarfile reads it, and so webdataset, with its table.

    local shard --tarfile--> names, offsets, sizes --our rule for names--> compared with the table

It ends a shard silently at a damaged header, where our own reader goes on.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.common.console import plural
from pipeline.data.index.table import ShardTable
from pipeline.data.index.tar import split_name
from pipeline.data.index.tar_header import plain_name

Row = tuple[str, str, int, int]  # key, suffix, offset, bytes


def differences(shard: Path, table: ShardTable) -> Iterator[str]:
    """Yield how the members differ that tarfile finds, and those of the table."""
    ours = {
        (sample.key, suffix, *where)
        for sample in table.samples()
        for suffix, where in sample.members.items()
    }
    theirs, error = _found_by_tarfile(shard)
    if error:
        yield f"{shard.name}: Python's tarfile, and so webdataset, cannot read it: {error}"
        return
    missing = sorted(ours - theirs, key=lambda row: row[2])
    if missing:
        key, suffix, *_ = missing[0]
        yield (
            f"{shard.name}: Python's tarfile, and so webdataset, does not find "
            f"{plural(len(missing), 'member')}, such as {key}.{suffix}"
        )
    # A second member of one name in a sample is left out, and listed as damage.
    known = {(key, suffix) for key, suffix, *_ in ours}
    more = sorted((row for row in theirs if row[:2] not in known), key=lambda row: row[2])
    if more:
        key, suffix, *_ = more[0]
        yield (
            f"{shard.name}: Python's tarfile finds {plural(len(more), 'member')} more, such as "
            f"{key}.{suffix}"
        )


def _found_by_tarfile(shard: Path) -> tuple[set[Row], str]:
    """The members of samples that tarfile finds, hard links included; and its error."""
    found: set[Row] = set()
    where: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                vars(tar)["members"].clear()  # it would keep them all
                # Bytes that are not UTF-8 are written as in the table.
                name = member.name.encode("utf-8", "surrogateescape")
                name = name.decode("utf-8", "backslashreplace")
                if member.isreg() and not member.issparse():
                    at = member.offset_data, member.size
                elif member.islnk():
                    at = where.get(plain_name(member.linkname))
                else:
                    continue
                names = split_name(name)
                if at is not None:
                    where[plain_name(name)] = at
                    if names is not None:
                        found.add((*names, *at))
    except (tarfile.TarError, EOFError, ValueError) as error:
        return found, str(error)
    return found, ""
