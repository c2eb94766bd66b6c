"""The class of a sample: the number in its `.cls` member, as webdataset has it."""

SUFFIX = "cls"
NONE = -1
MAX_BYTES = 32  # of the member; an int64 takes 20


def parse_label(text: bytes) -> int:
    """Return the class number; -1 where the text is no int64."""
    try:
        label = int(text)
    except ValueError:
        return NONE
    return label if -(2**63) <= label < 2**63 else NONE
