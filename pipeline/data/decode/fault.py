"""The error of a bad sample. The stream keeps its slot at weight 0 (a tombstone)."""

import re

Content = bytes | bytearray  # to decode: a member's bytes, or a copy in a reused buffer

_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")


class DecodeError(Exception):
    """A sample's bytes cannot be used. Its slot stays at weight 0; other samples keep their slots.

    stage: "member" (no such file in the sample), "size" (above the bound), "decode" (damaged or
    unknown content), "shape", "dtype" or "range" (an array that breaks its declaration).
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {stable_reason(reason)}")
        self.stage = stage
        self.reason = stable_reason(reason)


def missing_member() -> DecodeError:
    """The fault of a sample that lacks the member to decode."""
    return DecodeError("member", "the sample has no member with a wanted suffix")


def stable_reason(reason: object) -> str:
    """Return a reason's text without memory addresses, which libraries put into messages."""
    return _ADDRESS.sub("", str(reason))
