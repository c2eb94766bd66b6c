"""What the pass over a shard reads of small members: labels, and faults of texts and metadata.

.cls -> label, or why there is none       .txt, .json -> is it UTF-8, is it JSON?
"""

import json
from collections.abc import Sequence

from pipeline.common.labels import MAX_LABEL_BYTES, NO_LABEL, label_of
from pipeline.data.index.left_out import (
    JSON_INVALID,
    LABEL_MINUS_ONE,
    LABEL_NOT_INTEGER,
    TEXT_NOT_UTF8,
    Tally,
)
from pipeline.data.index.one_pass import OnePass
from pipeline.data.index.tar import TarSample

LABEL_SUFFIX = "cls"
MAX_TEXT_BYTES = 1 << 20  # longer texts are not looked at


class ContentChecks:
    """Labels and faults of the members of one shard, by suffix and offset.

    Members that are links to one content are read once. with_json: JSON is parsed, too.
    """

    def __init__(self, reader: OnePass, *, with_json: bool) -> None:
        self._reader = reader
        self._suffixes = (LABEL_SUFFIX, "txt", "json") if with_json else (LABEL_SUFFIX, "txt")
        self._label_at: dict[int, int] = {}
        self._fault_at: dict[tuple[str, int], str] = {}
        self._checked: dict[str, set[int]] = {suffix: set() for suffix in self._suffixes}

    def visit(self, name: str, offset: int, num_bytes: int) -> None:
        """Read a member during the pass, if it is of interest."""
        suffix = name[name.rfind(".") + 1 :].lower()
        checked = self._checked.get(suffix)
        if checked is None or offset in checked:
            return
        checked.add(offset)
        if suffix == LABEL_SUFFIX:
            self._read_label(offset, num_bytes)
        elif num_bytes <= MAX_TEXT_BYTES:
            content = self._reader.read(offset, num_bytes)
            if not (_is_utf8(content) if suffix == "txt" else _is_json(content)):
                fault = TEXT_NOT_UTF8 if suffix == "txt" else JSON_INVALID
                self._fault_at[suffix, offset] = fault

    def _read_label(self, offset: int, num_bytes: int) -> None:
        is_short = num_bytes <= MAX_LABEL_BYTES
        label = label_of(self._reader.read(offset, num_bytes)) if is_short else None
        self._label_at[offset] = NO_LABEL if label is None else label
        if label is None or label == NO_LABEL:
            fault = LABEL_NOT_INTEGER if label is None else LABEL_MINUS_ONE
            self._fault_at[LABEL_SUFFIX, offset] = fault

    def labels(self, samples: Sequence[TarSample]) -> list[int]:
        """The class of each sample; NO_LABEL where it has none."""
        offsets = (sample.members.get(LABEL_SUFFIX, (-1, 0))[0] for sample in samples)
        return [self._label_at.get(offset, NO_LABEL) for offset in offsets]

    def count(self, samples: Sequence[TarSample], tally: Tally) -> None:
        """Count the faults of the members that belong to samples."""
        if not self._fault_at:
            return
        for sample in samples:
            for suffix in self._suffixes:
                offset = sample.members.get(suffix, (-1, 0))[0]
                fault = self._fault_at.get((suffix, offset))
                if fault is not None:
                    tally.add(fault, f"{sample.key}.{suffix}")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True
