"""The one error that a bad sample raises; the stream turns it into a tombstone."""


class DecodeError(Exception):
    """One sample's bytes are unusable: its slot stays, at weight 0, and nobody else moves.

    stage: "member" (no such file in the sample), "size" (above the bound), "decode" (damaged or
    unknown content), "shape", "dtype" or "range" (an array that breaks its declaration).
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason


def missing_member() -> DecodeError:
    """The fault of a sample that lacks the member to decode."""
    return DecodeError("member", "the sample has no member with a wanted suffix")
