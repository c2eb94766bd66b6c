"""Why a sample cannot be read, in words that are the same on every run."""

import re

_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")


def stable_reason(reason: object) -> str:
    """Return the text without memory addresses, which libraries put into their messages."""
    return _ADDRESS.sub("", str(reason))
