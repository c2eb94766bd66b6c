"""A tar reader: ustar, GNU and PAX members with their offsets, and a report of all damage.

    shard bytes -> headers (checksums checked) -> members -> tar.py: samples
                        |-> damage: bad header, truncated member, no end marker ...
                        `-> counts of what is no file: links, devices ...

A hard link is a member with the bytes of the earlier member that it names.

Python's `tarfile`, and so webdataset, ends a shard silently at one damaged header; this reader
continues at the next valid header and reports the gap. It reads forward, and reads back only after
damage. It holds the members' names, one extension header and one piece of a content.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.data.index.left_out import (
    HARD_LINK,
    SPECIAL,
    SYMBOLIC_LINK,
    UNKNOWN_TYPE,
    Damage,
    Tally,
)
from pipeline.data.index.tar_header import (
    BLOCK,
    DIRECTORY_TYPES,
    EMPTY_TYPES,
    EXTENSION_TYPES,
    FILE_TYPES,
    GLOBAL_TYPE,
    HARD_LINK_TYPE,
    MAX_PAX_DIGITS,
    SPARSE_TYPE,
    SPECIAL_TYPES,
    SYMBOLIC_LINK_TYPE,
    ZERO_BLOCK,
    Header,
    is_shortened,
    other_format,
    padded,
    parse_extension,
    parse_header,
    plain_name,
)

MAX_EXTENSION_BYTES = 8 << 20  # a larger extension header counts as damage
PIECE_BYTES = 64 << 10
NO_CHECKSUM = -1

ReadBytes = Callable[[int, int], bytes]  # (offset, size) -> that many bytes, fewer at the end
# (name, offset, size, CRC-32 if known, as of a hard link), in the pass -> CRC-32 or NO_CHECKSUM
Visit = Callable[[str, int, int, int], int]


class Member(NamedTuple):
    """A file in a tar: its name, and where its content lies."""

    name: str
    offset: int
    num_bytes: int
    crc32: int = NO_CHECKSUM


class TarScan:
    """One pass over a tar: iterate over its members, then read `damage`."""

    def __init__(self, read: ReadBytes, size: int, visit: Visit | None = None) -> None:
        self._read = read
        self._size = size
        self._visit = visit
        self._passed = 0  # end of the visited contents
        self._offset = 0
        self._overrides: dict[str, bytes] = {}
        self._global_overrides: dict[str, bytes] = {}
        self._lost_extension = False  # the skipped bytes may have held the next member's name
        self._members: dict[str, Member] = {}  # by their names, for the hard links to them
        self._has_header = False
        self._parsed: tuple[int, Header | None] = -1, None
        self.damage: list[Damage] = []
        self.left_out = Tally()

    def __iter__(self) -> Iterator[Member]:
        """Yield the files whose content is complete; what is no file is counted in `left_out`."""
        beginning = self._read(0, BLOCK)
        other = other_format(beginning)
        if other is None:
            yield from self._found()
        if not self._has_header and (self.damage or other is not None):
            text = other or (f"it begins with {beginning[:8]!r}" if self._size else "it is empty")
            self.damage[:] = [Damage("not_tar", 0, self._size, f"is no tar: {text}")]

    def _found(self) -> Iterator[Member]:
        while self._offset < self._size:
            block = self._read(self._offset, BLOCK)
            if block == ZERO_BLOCK and self._ends_here():
                return
            header = self._header_at(self._offset)
            if header is None:
                self._resynchronise("bad_header", "damaged header")
                continue
            self._has_header = True
            yield from self._member(header)
        self._report("no_end_marker", self._size, 0, "the two zero blocks at the end are missing")

    def _report(self, kind: str, offset: int, num_bytes: int, text: str) -> None:
        self.damage.append(Damage(kind, offset, num_bytes, text))

    def _ends_here(self) -> bool:
        """Tell whether the current zero block starts the end marker; report what follows it."""
        second = self._read(self._offset + BLOCK, BLOCK)
        if second != ZERO_BLOCK:
            if len(second) == BLOCK:
                return False  # a single zeroed header is damage, not the end
            self._report("no_end_marker", self._offset, 0, "the end marker is cut short")
            return True
        start = stop = self._offset + 2 * BLOCK
        for offset in range(start, self._size, PIECE_BYTES):
            data = self._read(offset, PIECE_BYTES).rstrip(b"\0")
            stop = offset + len(data) if data else stop
        if stop > start:
            text = "data follows the end marker (concatenated tars?) and is not read"
            self._report("data_after_end", start, stop - start, text)
        return True

    def _resynchronise(self, kind: str, what: str) -> None:
        """Skip the current header and everything up to the next valid one."""
        start = self._offset
        self._offset = self._find_header(start + BLOCK, self._size)
        self._overrides = {}
        self._lost_extension = True
        lost = self._offset - start
        goes_on = self._offset < self._size
        where = f"reading goes on at byte {self._offset}" if goes_on else "to the end"
        self._report(kind, start, lost, f"{what}; {lost} bytes skipped, {where}")

    def _find_header(self, offset: int, stop: int, *, or_end: bool = True) -> int:
        """Offset of the next ustar header from `offset` on, or of the end marker; else `stop`."""
        while offset < stop:
            block = self._read(offset, BLOCK)
            if block == ZERO_BLOCK:
                data = self._skip_zeros(offset)
                if or_end and data >= self._size and self._size - offset >= 2 * BLOCK:
                    break
                offset = data
                continue
            header = parse_header(block)
            if header is not None and header.has_magic:
                break
            offset += BLOCK
        return min(offset, stop)

    def _skip_zeros(self, offset: int) -> int:
        """The next block from `offset` on that is not zero, or the end of the file."""
        while offset < self._size:
            piece = self._read(offset, PIECE_BYTES)
            rest = len(piece.lstrip(b"\0"))
            if rest:
                return offset + (len(piece) - rest) // BLOCK * BLOCK
            offset += len(piece)
        return self._size

    def _member(self, header: Header) -> Iterator[Member]:
        start = self._offset + BLOCK
        is_extension = header.type in EXTENSION_TYPES
        num_bytes = header.num_bytes if is_extension else self._true_size(header)
        name = "an extension header" if is_extension else self._name(header)
        if start + num_bytes > self._size:
            missing = start + num_bytes - self._size
            self._give_up(name, f"{name!r}: {missing} of {num_bytes} bytes are missing")
            return
        is_file = header.type in FILE_TYPES and not (header.type == b"\0" and name.endswith("/"))
        visits = is_file and self._visit is not None
        # Read the content first, then check the header after it. After reading back, check the size
        # first: many headers that claim the same bytes must not all be read.
        goes_forward = start >= self._passed
        crc32 = self._visited(name, start, num_bytes) if visits and goes_forward else NO_CHECKSUM
        if not self._is_size_right(name, start, num_bytes, is_extension=is_extension):
            self._resynchronise("wrong_size", f"{name!r} has not its {num_bytes} bytes")
            return
        if is_extension:
            self._extend(header.type, start, num_bytes)
            return
        if visits and not goes_forward:
            crc32 = self._visited(name, start, num_bytes)
        self._offset = start + padded(num_bytes)
        member = Member(name, start, num_bytes, crc32)
        found = self._file(header, member, is_file=is_file)
        self._overrides, self._lost_extension = {}, False
        if found is not None:
            self._members[plain_name(name)] = found
            yield found

    def _file(self, header: Header, entry: Member, *, is_file: bool) -> Member | None:
        """The file that an entry of a tar is; else None, and it is counted or reported."""
        name, is_link = entry.name, header.type == HARD_LINK_TYPE
        is_sparse = header.type == SPARSE_TYPE
        if self._overrides:
            is_sparse |= any(key.startswith("GNU.sparse") for key in self._overrides)
        is_nameless = self._lost_extension and header.is_doubtful_name
        if is_sparse:
            text = f"{name!r} is a sparse file: not supported"
            self._report("sparse", entry.offset, entry.num_bytes, text)
        elif (is_file or is_link) and is_nameless and "path" not in self._overrides:
            text = f"{name!r}: its whole name stood in a damaged header; it is left out"
            self._report("no_name", entry.offset - BLOCK, BLOCK + entry.num_bytes, text)
        elif is_file:
            return entry
        elif is_link:
            return self._linked(header, name)
        elif header.type == SYMBOLIC_LINK_TYPE:
            self.left_out.add(SYMBOLIC_LINK, name)
        elif header.type in SPECIAL_TYPES:
            self.left_out.add(SPECIAL, name)
        elif header.type not in DIRECTORY_TYPES | {b"\0"}:  # \0: of old programs, as `name/`
            self.left_out.add(UNKNOWN_TYPE, name)
        return None

    def _linked(self, header: Header, name: str) -> Member | None:
        """The member that a hard link makes of an earlier one's content; None without that."""
        path = self._overrides.get("linkpath", self._global_overrides.get("linkpath"))
        is_lost = path is None and self._lost_extension and is_shortened(header.link_name)
        text = (path or header.link_name).decode("utf-8", errors="backslashreplace")
        target = None if is_lost else self._members.get(plain_name(text))
        if target is None:
            self.left_out.add(HARD_LINK, name)
            return None
        if self._visit is not None:
            self._visit(name, target.offset, target.num_bytes, target.crc32)
        return target._replace(name=name)

    def _visited(self, name: str, start: int, num_bytes: int) -> int:
        self._passed = max(self._passed, start + num_bytes)
        if self._visit is None:
            return NO_CHECKSUM
        return self._visit(name, start, num_bytes, NO_CHECKSUM)

    def _is_size_right(self, name: str, start: int, num_bytes: int, *, is_extension: bool) -> bool:
        """Tell whether the size of a content is plausible.

        It is wrong if no header follows the content but one lies inside it: bytes are missing, or
        the size was forged. Members that are tars are trusted; an extension header contains no
        headers.
        """
        if num_bytes == 0 or name.endswith(".tar"):
            return True
        if not is_extension and self._is_boundary(start + padded(num_bytes)):
            return True
        return self._find_header(start, start + num_bytes, or_end=False) == start + num_bytes

    def _give_up(self, name: str, what: str) -> None:
        """Leave out a member that exceeds the shard; headers inside a nested tar do not count."""
        if not name.endswith(".tar"):
            self._resynchronise("truncated", what)
            return
        self._report("truncated", self._offset, self._size - self._offset, what)
        self._offset = self._size

    def _is_boundary(self, offset: int) -> bool:
        """Tell whether there is a header or the end marker at `offset`."""
        block = self._read(offset, BLOCK)
        if block == ZERO_BLOCK:
            return self._read(offset + BLOCK, BLOCK) == ZERO_BLOCK
        return self._header_at(offset) is not None

    def _header_at(self, offset: int) -> Header | None:
        if self._parsed[0] != offset:  # each is looked at twice: behind a content, and itself
            self._parsed = offset, parse_header(self._read(offset, BLOCK))
        return self._parsed[1]

    def _true_size(self, header: Header) -> int:
        if header.type in EMPTY_TYPES:
            return 0
        size = self._overrides.get("size", self._global_overrides.get("size", b""))
        return int(size) if size.isdigit() and len(size) <= MAX_PAX_DIGITS else header.num_bytes

    def _name(self, header: Header) -> str:
        name = self._overrides.get("path", self._global_overrides.get("path", header.name))
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            text = name.decode("utf-8", errors="backslashreplace")
            self._report("name", self._offset, 0, f"a name is not UTF-8; it is read as {text!r}")
            return text

    def _extend(self, kind: bytes, start: int, num_bytes: int) -> None:
        """Store what an extension header says about the members after it, unless it is damaged."""
        self._offset = start + padded(num_bytes)
        records = None
        if num_bytes <= MAX_EXTENSION_BYTES:
            records = parse_extension(kind, self._read(start, num_bytes))
        if records is None:
            self._lost_extension = True
            text = "an extension header that cannot be read"
            self._report("bad_extension", start - BLOCK, BLOCK + num_bytes, text)
        elif kind == GLOBAL_TYPE:
            self._global_overrides |= records
        else:
            self._overrides |= records
            self._lost_extension = False
