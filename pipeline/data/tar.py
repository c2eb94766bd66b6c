"""Our tar reader: ustar, GNU and PAX members with their offsets, and everything that was lost.

    shard bytes -> headers (checksums checked) -> members -> samples (webdataset's grouping)
                        `-> damage: bad header, truncated member, no end marker, duplicate ...

Python's `tarfile`, and so webdataset, ends a shard silently at one damaged header; this reader
goes on at the next valid header and reports the gap. It reads forward only.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
# webdataset's rule: the key is the path up to the first dot of the base name.
KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
META_NAME = re.compile(r"__[^/]*__($|/)")
FILE_TYPES = frozenset((b"0", b"\0", b"7"))  # POSIX file, old file, contiguous file
SPARSE_TYPE = b"S"
# Links, devices, directories and pipes carry no data, whatever their size field says.
EMPTY_TYPES = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))

ReadBytes = Callable[[int, int], bytes]  # (offset, size) -> that many bytes, fewer at the end


@dataclass(frozen=True)
class Damage:
    """One thing wrong in a shard: what kind, where, how many bytes it concerns, in words."""

    kind: str
    offset: int
    num_bytes: int
    text: str


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and where its content lies."""

    name: str
    offset: int
    num_bytes: int


@dataclass
class TarSample:
    """Consecutive members that share a key: suffix -> (offset, bytes)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])


@dataclass(frozen=True)
class _Header:
    name: bytes
    num_bytes: int
    type: bytes
    has_magic: bool


def _text(block: bytes) -> bytes:
    return block.split(b"\0", 1)[0]


def _number(digits: bytes) -> int:
    """An octal field, or GNU's base-256 one; raise ValueError."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b" \0")
    if not text:
        return 0
    if not text.isdigit():
        raise ValueError(f"no octal number: {digits!r}")
    return int(text, 8)


def parse_header(block: bytes) -> _Header | None:
    """Read one header block; None unless it is complete and its checksum holds."""
    if len(block) < BLOCK:
        return None
    try:
        stored = _number(block[148:156])
        if sum(block) - sum(block[148:156]) + 8 * 0x20 != stored:
            return None
        num_bytes = _number(block[124:136])
    except ValueError:
        return None
    name = _text(block[:100])
    magic = block[257:265]
    if magic[:6] == b"ustar\0" and block[345]:
        name = _text(block[345:500]) + b"/" + name
    return _Header(name, num_bytes, block[156:157], magic[:5] == b"ustar")


class TarScan:
    """One pass over a tar: iterate for its members, then read `damage`."""

    def __init__(self, read: ReadBytes, size: int) -> None:
        self._read = read
        self._size = size
        self._offset = 0
        self._overrides: dict[str, bytes] = {}
        self._global_overrides: dict[str, bytes] = {}
        self.damage: list[Damage] = []

    def __iter__(self) -> Iterator[Member]:
        """Yield the files whose content is complete, in order; directories and links are not."""
        while self._offset < self._size:
            block = self._read(self._offset, BLOCK)
            if block == ZERO_BLOCK and self._ends_here():
                return
            header = parse_header(block)
            if header is None:
                self._resynchronise()
                continue
            yield from self._member(header)
        self._report("no_end_marker", self._size, 0, "the two zero blocks at the end are missing")

    def _report(self, kind: str, offset: int, num_bytes: int, text: str) -> None:
        self.damage.append(Damage(kind, offset, num_bytes, text))

    def _ends_here(self) -> bool:
        """Tell whether the zero block at hand starts the end marker; report what follows it."""
        second = self._read(self._offset + BLOCK, BLOCK)
        if second != ZERO_BLOCK:
            if len(second) == BLOCK:
                return False  # one zeroed header amid data: damage, not the end
            self._report("no_end_marker", self._offset, 0, "the end marker is cut short")
            return True
        start = self._offset + 2 * BLOCK
        if self._zeros_start > start:
            text = "data follows the end marker (concatenated tars?) and is not read"
            self._report("data_after_end", start, self._zeros_start - start, text)
        return True

    @cached_property
    def _zeros_start(self) -> int:
        """Where the zero blocks at the end of the file start; there can be no member after it."""
        offset = -(-self._size // BLOCK) * BLOCK
        while offset > 0 and not self._read(offset - BLOCK, BLOCK).strip(b"\0"):
            offset -= BLOCK
        return offset

    def _resynchronise(self) -> None:
        start = self._offset
        offset = start + BLOCK
        while offset < self._size and not self._is_header(offset):
            offset += BLOCK
        self._offset = min(offset, self._size)
        self._overrides = {}
        lost = self._offset - start
        where = f"reading goes on at byte {self._offset}" if offset < self._size else "to the end"
        text = f"damaged header; {lost} bytes skipped, {where}"
        self._report("bad_header", start, lost, text)

    def _is_header(self, offset: int) -> bool:
        """A ustar header, or the end marker."""
        if offset == self._zeros_start and self._size - offset >= 2 * BLOCK:
            return True
        header = parse_header(self._read(offset, BLOCK))
        return header is not None and header.has_magic

    def _member(self, header: _Header) -> Iterator[Member]:
        start = self._offset + BLOCK
        is_extension = header.type in (b"x", b"g", b"L", b"K", b"X")
        num_bytes = header.num_bytes if is_extension else self._true_size(header)
        stop = start + num_bytes
        self._offset = start + -(-num_bytes // BLOCK) * BLOCK
        if stop > self._size:
            self._report(
                "truncated",
                start,
                self._size - start,
                f"{self._name(header)!r}: {stop - self._size} of {num_bytes} bytes are missing",
            )
            self._offset = self._size
            return
        if is_extension:
            self._extend(header.type, self._read(start, num_bytes))
            return
        name = self._name(header)
        overrides, self._overrides = self._overrides, {}
        is_sparse = header.type == SPARSE_TYPE or any(k.startswith("GNU.sparse") for k in overrides)
        if is_sparse:
            self._report("sparse", start, num_bytes, f"{name!r} is a sparse file: not supported")
        elif header.type in FILE_TYPES and not (header.type == b"\0" and name.endswith("/")):
            yield Member(name, start, num_bytes)

    def _true_size(self, header: _Header) -> int:
        if header.type in EMPTY_TYPES:
            return 0
        size = self._overrides.get("size", self._global_overrides.get("size"))
        return int(size) if size is not None and size.isdigit() else header.num_bytes

    def _name(self, header: _Header) -> str:
        name = self._overrides.get("path", self._global_overrides.get("path", header.name))
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            text = name.decode("utf-8", errors="backslashreplace")
            self._report("name", self._offset, 0, f"a name is not UTF-8; it is read as {text!r}")
            return text

    def _extend(self, kind: bytes, content: bytes) -> None:
        """Keep what an extension header says of the members after it."""
        if kind == b"L":
            self._overrides["path"] = _text(content)
        elif kind in (b"x", b"X"):
            self._overrides |= parse_pax(content)
        elif kind == b"g":
            self._global_overrides |= parse_pax(content)


def parse_pax(content: bytes) -> dict[str, bytes]:
    """Read PAX records `length key=value\\n` (POSIX pax, "Extended Header"); stop at a bad one."""
    records: dict[str, bytes] = {}
    position = 0
    while position < len(content):
        digits, _, _ = content[position : position + 24].partition(b" ")
        stop = position + int(digits) if digits.isdigit() else 0
        key, separator, value = content[position + len(digits) + 1 : stop].partition(b"=")
        if stop > len(content) or not separator or not value.endswith(b"\n"):
            break
        records[key.decode("utf-8", errors="replace")] = value[:-1]
        position = stop
    return records


def group_samples(scan: TarScan) -> Iterator[TarSample]:
    """Group a scan's members into samples by webdataset's rule; duplicates go to its damage."""
    current: TarSample | None = None
    for member in scan:
        match = KEY_AND_SUFFIX.fullmatch(member.name)
        if match is None or META_NAME.match(member.name):
            continue
        key, suffix = match.group(1), match.group(2).lower()
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = TarSample(key)
        if suffix in current.members:
            text = f"{member.name!r}: the sample already has a .{suffix}; the first one counts"
            scan.damage.append(Damage("duplicate_member", member.offset, member.num_bytes, text))
        else:
            current.members[suffix] = (member.offset, member.num_bytes)
    if current is not None:
        yield current
