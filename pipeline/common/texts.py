"""Texts that are not UTF-8, without loss: in memory, and in formats that hold UTF-8 alone.

    bytes <--surrogateescape--> Rows <--escaped, unescaped--> Parquet, and what a reader returns
                                     <--surrogateescape--> tar and safetensors, as the bytes were

Clean texts are the same everywhere. A format says which of its texts are escaped.
"""

import re
from collections.abc import Sequence

# How Python keeps bytes that are no UTF-8 in a str: as lone surrogates, which no UTF-8 text holds.
KEEP = "surrogateescape"
_ESCAPE = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


def from_bytes(data: bytes) -> str:
    """Return a text from which `to_bytes` makes the same bytes again, whatever they are."""
    return data.decode("utf-8", KEEP)


def to_bytes(text: str) -> bytes:
    """Return what `from_bytes` was given, or the UTF-8 of any other text."""
    return text.encode("utf-8", KEEP)


def is_utf8(text: str) -> bool:
    """Return whether a text has no lone surrogate: it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str) -> str:
    r"""Return a text that is not UTF-8 with its other bytes as \xNN, and a backslash as two."""
    return to_bytes(text.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")


def unescaped(text: str) -> str:
    """Return the text that `escaped` was given."""

    def byte(found: re.Match[bytes]) -> bytes:
        return b"\\" if found[1] is None else bytes.fromhex(found[1].decode())

    return from_bytes(_ESCAPE.sub(byte, text.encode()))


def shown(text: str | None) -> str | None:
    """Return a text as a reader gives it: as it is, or escaped."""
    return text if text is None or is_utf8(text) else escaped(text)


def not_utf8(texts: Sequence[str | None]) -> list[int]:
    """Return the positions of the texts that are not UTF-8."""
    return [i for i, text in enumerate(texts) if text is not None and not is_utf8(text)]
