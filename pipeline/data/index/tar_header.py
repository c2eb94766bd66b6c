"""Parsing of tar blocks: ustar, GNU and old headers, and the records of PAX extensions.

512 bytes --parse_header--> name, size, type, or None; extension content --parse_pax--> records
"""

from dataclasses import dataclass

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
FILE_TYPES = frozenset((b"0", b"\0", b"7"))  # POSIX file, old file, contiguous file
SPARSE_TYPE = b"S"
# Links, devices, directories and pipes carry no data, whatever their size field says.
EMPTY_TYPES = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
PAX_TYPES = frozenset((b"x", b"X"))
GLOBAL_TYPE = b"g"
LONG_NAME_TYPE = b"L"
EXTENSION_TYPES = PAX_TYPES | {GLOBAL_TYPE, LONG_NAME_TYPE, b"K"}
MAX_PAX_DIGITS = 20  # of a length or a size: as many as 2**64 has


@dataclass(frozen=True)
class Header:
    """One member's header. `is_doubtful_name`: an extension before it may hold the whole name."""

    name: bytes
    num_bytes: int
    type: bytes
    has_magic: bool
    is_doubtful_name: bool


def text_of(block: bytes) -> bytes:
    """A field's content, which ends at the first zero byte."""
    return block.split(b"\0", 1)[0]


def padded(num_bytes: int) -> int:
    """How many bytes a content takes in a tar: whole blocks."""
    return -(-num_bytes // BLOCK) * BLOCK


def _number(digits: bytes) -> int:
    """An octal field, or GNU's base-256 one; raise ValueError, for negative numbers, too."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b" \0")
    if not text:
        return 0
    if not text.isdigit():
        raise ValueError(f"no octal number: {digits!r}")
    return int(text, 8)


def _is_checksum(block: bytes, stored: int) -> bool:
    """Compare the checksum; some old programs summed signed bytes."""
    others = block[:148] + block[156:]
    unsigned = sum(others) + 8 * 0x20
    return stored == unsigned or stored == unsigned - 256 * sum(byte > 127 for byte in others)


def parse_header(block: bytes) -> Header | None:
    """Read one header block; None unless it is complete and its checksum holds."""
    if len(block) < BLOCK:
        return None
    try:
        if not _is_checksum(block, _number(block[148:156])):
            return None
        num_bytes = _number(block[124:136])
    except ValueError:
        return None
    name = text_of(block[:100])
    is_doubtful = len(name) == 100 or b"?" in name  # as writers shorten a longer name
    magic = block[257:265]
    if magic[:6] == b"ustar\0" and block[345]:
        name = text_of(block[345:500]) + b"/" + name
    return Header(name, num_bytes, block[156:157], magic[:5] == b"ustar", is_doubtful)


def parse_long_name(content: bytes) -> dict[str, bytes] | None:
    """The path in GNU's long-name member; None if that holds anything else."""
    name = text_of(content)
    return None if content[len(name) :].strip(b"\0") else {"path": name}


def parse_pax(content: bytes) -> dict[str, bytes] | None:
    """Read PAX records `length key=value\\n` (POSIX pax, "Extended Header"); None if one is bad."""
    records: dict[str, bytes] = {}
    position = 0
    while position < len(content):
        digits, _, _ = content[position : position + MAX_PAX_DIGITS + 1].partition(b" ")
        stop = position + int(digits) if digits.isdigit() else 0
        key, separator, value = content[position + len(digits) + 1 : stop].partition(b"=")
        if stop > len(content) or not separator or not value.endswith(b"\n"):
            return None
        records[key.decode("utf-8", errors="replace")] = value[:-1]
        position = stop
    return records
