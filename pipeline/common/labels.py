"""The class of a sample: the number in its `.cls` member, as webdataset has it.

The index of a data set and the readers of exports share the rule, so that both find the same label.
"""

NO_LABEL = -1  # the sample has none
MAX_LABEL_BYTES = 32  # of the member; an int64 takes 20


def label_of(content: bytes) -> int | None:
    """Return the label that a member holds; None if it is no int64."""
    try:
        label = int(content) if len(content) <= MAX_LABEL_BYTES else None
    except ValueError:
        return None
    return label if label is not None and -(2**63) <= label < 2**63 else None
