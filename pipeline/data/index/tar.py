"""The members of a tar as samples, by webdataset's rule.

TarScan -> members -> names -> key and suffix -> samples: neighbours with one key
                          `-> counts of those that are left out, by reason
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.data.index.left_out import (
    DOTTED_SUFFIX,
    DUNDER_NAME,
    EMPTY_NAME,
    IMAGE_SUFFIXES,
    METADATA,
    NO_SUFFIX,
    SECOND_PICTURE,
    SIDECAR,
    Damage,
    is_dotted,
    is_sidecar,
)
from pipeline.data.index.tar_scan import NO_CHECKSUM, TarScan

# webdataset's rule: the key is the path up to the first dot of the base name.
KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
META_NAME = re.compile(r"__[^/]*__($|/)")


@dataclass
class TarSample:
    """Consecutive members that share a key: suffix -> (offset, bytes), suffix -> CRC-32 if known.

    Samples with the same key are different samples unless they are neighbours, as in webdataset.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    checksums: dict[str, int] = field(default_factory=dict[str, int])


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and suffix by webdataset's rule; None for names that belong to no sample.

    Other than webdataset, a file whose name begins with a dot makes no sample of its folder, and
    breaks no sample apart.
    """
    match = KEY_AND_SUFFIX.fullmatch(name)
    if match is None or META_NAME.match(name):
        return None
    key, suffix = match.groups()
    # Where the base name begins with a dot, the rule takes `cats/` of `cats/._a.png` for a key.
    return None if key.endswith("/") or is_sidecar(name) else (key, suffix.lower())


def why_left_out(name: str) -> str:
    """The reason why a name belongs to no sample."""
    if is_sidecar(name):
        return SIDECAR
    if META_NAME.match(name):
        return DUNDER_NAME if "/" in name else METADATA
    return NO_SUFFIX if name.rpartition("/")[2] else EMPTY_NAME


def group_samples(scan: TarScan) -> Iterator[TarSample]:
    """Group a scan's members into samples by webdataset's rule.

    Duplicates go to the scan's damage, members that belong to no sample to its counts.
    """
    current: TarSample | None = None
    for member in scan:
        found = split_name(member.name)
        if found is None:
            scan.left_out.add(why_left_out(member.name), member.name)
            continue
        key, suffix = found
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = TarSample(key)
        if suffix in current.members:
            text = f"{member.name!r}: the sample already has a .{suffix}; the first one counts"
            scan.damage.append(Damage("duplicate_member", member.offset, member.num_bytes, text))
            continue
        if is_dotted(suffix):
            scan.left_out.add(DOTTED_SUFFIX, member.name)
        elif suffix in IMAGE_SUFFIXES and not IMAGE_SUFFIXES.isdisjoint(current.members):
            scan.left_out.add(SECOND_PICTURE, member.name)
        current.members[suffix] = (member.offset, member.num_bytes)
        if member.crc32 != NO_CHECKSUM:
            current.checksums[suffix] = member.crc32
    if current is not None:
        yield current
