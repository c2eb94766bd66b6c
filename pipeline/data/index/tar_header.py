"""Parsing of tar blocks: ustar, GNU and old headers, and the records of PAX extensions.

512 bytes --parse_header--> name, size, type, or None; extension content --parse_pax--> records
"""

from posixpath import normpath
from typing import NamedTuple

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
FILE_TYPES = frozenset((b"0", b"\0", b"7"))  # POSIX file, old file, contiguous file
SPARSE_TYPE = b"S"
HARD_LINK_TYPE = b"1"
SYMBOLIC_LINK_TYPE = b"2"
DIRECTORY_TYPES = frozenset((b"5", b"D"))  # D: GNU tar's, with the names in it
# Devices and pipes; V: a volume's label.
SPECIAL_TYPES = frozenset((b"3", b"4", b"6", b"V"))
# Links, devices, directories and pipes carry no data, whatever their size field says.
EMPTY_TYPES = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
PAX_TYPES = frozenset((b"x", b"X"))
GLOBAL_TYPE = b"g"
LONG_NAME_TYPE = b"L"
LONG_LINK_TYPE = b"K"
EXTENSION_TYPES = PAX_TYPES | {GLOBAL_TYPE, LONG_NAME_TYPE, LONG_LINK_TYPE}
MAX_PAX_DIGITS = 20  # of a length or a size: as many as 2**64 has
RANGES = "byte ranges cannot be read"
# How files begin that are sometimes taken for tars -> what they are, and what to do.
OTHER_FORMATS = {
    b"\x1f\x8b": f"gzip: decompress it; {RANGES}",
    b"\x28\xb5\x2f\xfd": f"zstd: decompress it; {RANGES}",
    b"BZh": f"bzip2: decompress it; {RANGES}",
    b"\xfd7zXZ\0": f"xz: decompress it; {RANGES}",
    b"\x04\x22\x4d\x18": f"lz4: decompress it; {RANGES}",
    b"\x1f\x9d": f"compress (.Z): decompress it; {RANGES}",
    b"PK\3\4": f"zip: unpack it and write a tar of its files; {RANGES}",
    b"7z\xbc\xaf\x27\x1c": f"7z: unpack it and write a tar of its files; {RANGES}",
    b"Rar!\x1a\x07": f"rar: unpack it and write a tar of its files; {RANGES}",
    b"version https://git-lfs": "a pointer of Git LFS: run `git lfs pull`",
    b"<!": "a web page, not the file: download it again",
    b"<html": "a web page, not the file: download it again",
}


class Header(NamedTuple):
    """One member's header; link_name: of the member that a link stands for."""

    name: bytes
    num_bytes: int
    type: bytes
    has_magic: bool
    is_doubtful_name: bool  # an extension before it may hold the whole name
    link_name: bytes


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
    is_doubtful, link_name = is_shortened(name), text_of(block[157:257])
    magic = block[257:265]
    if magic[:6] == b"ustar\0" and block[345]:
        name = text_of(block[345:500]) + b"/" + name
    has_magic = magic[:5] == b"ustar"
    return Header(name, num_bytes, block[156:157], has_magic, is_doubtful, link_name)


def plain_name(name: str) -> str:
    """A name as hard links may write it: `./a.png` is `a.png`."""
    return normpath(name) if "//" in name or "/." in name else name.removeprefix("./")


def is_shortened(name: bytes) -> bool:
    """Tell whether a field may hold the beginning of a longer name only."""
    return len(name) == 100 or b"?" in name


def other_format(block: bytes) -> str | None:
    """What a file is that begins with `block`, if that is known and no tar."""
    if block[257:262] == b"ustar" or parse_header(block) is not None:
        return None
    return next((text for magic, text in OTHER_FORMATS.items() if block.startswith(magic)), None)


def parse_extension(kind: bytes, content: bytes) -> dict[str, bytes] | None:
    """The records of an extension header, GNU's long names as PAX writes them; None if damaged."""
    if kind not in (LONG_NAME_TYPE, LONG_LINK_TYPE):
        return parse_pax(content)
    name = text_of(content)
    field = "path" if kind == LONG_NAME_TYPE else "linkpath"
    return None if content[len(name) :].strip(b"\0") else {field: name}


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
