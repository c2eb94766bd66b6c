"""Labels, texts and JSON of the samples: fields as labels and columns; what a column cannot hold.

Rows with `metadata` -> label by `data.label_field`, columns by `columns` -> Rows
Rows -> `left_out`: how many labels, texts and JSONs are not what the columns say, by reason

Every valid row must have the fields. A missing value is a mistake in the settings or the data set,
which is reported before the task is committed. What a column cannot hold is no mistake: the formats
keep its bytes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.labels import NO_LABEL, label_of
from pipeline.common.texts import not_utf8, to_bytes
from pipeline.latents.fields import INVALID, parse_texts, typed_values
from pipeline.latents.formats.writers import Column, ColumnType, Rows

SHOWN = 80  # characters of a sample's JSON in a message

# What was not kept as a value, and where it is. The reasons are those of an index.
REASONS = {
    "label_not_integer": "labels that are no integer: none, their text is in label_text",
    "label_minus_one": "labels of -1, which also stands for none: label_text tells them apart",
    "text_not_utf8": "texts that are not UTF-8: kept, with such bytes as \\xe9",
    "json_invalid": "JSON texts that are no JSON: kept as they are, without fields",
}

LeftOut = dict[str, dict[str, Any]]  # reason -> count, and the first key as an example


@dataclass(frozen=True)
class JsonFields:
    """The fields to read from the JSON."""

    label: str | None = None  # None = the label is that of the index
    columns: Mapping[str, ColumnType] = field(default_factory=dict[str, ColumnType])

    def apply(self, rows: Rows) -> Rows:
        """Return the rows with labels and columns; raise UserError when a valid row has none."""
        if self.label is None and not self.columns:
            return rows
        parsed = parse_texts(rows.metadata)
        if self.label is not None:
            found = _values(rows, parsed, self.label, "int64", "data.label_field")
            labels = [NO_LABEL if value is None else value for value in found]
            minus_one = {i: str(value) for i, value in enumerate(found) if value == NO_LABEL}
            rows = replace(rows, labels=np.array(labels, np.int64), label_texts=minus_one)
        columns = {
            name: Column(kind, _values(rows, parsed, name, kind, "columns"))
            for name, kind in sorted(self.columns.items())
        }
        return replace(rows, columns=columns)


def _values(
    rows: Rows, parsed: Sequence[Any], name: str, kind: ColumnType, setting: str
) -> list[Any]:
    values = typed_values(parsed, name, kind)
    lacking = [i for i, value in enumerate(values) if value is None and rows.valid[i]]
    if lacking:
        first = lacking[0]
        text = rows.metadata[first] or "nothing"
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
        raise UserError(
            f"{len(lacking)} of the {len(rows)} samples of {rows.shard} have no field {name!r} of "
            f"type {kind} in their JSON; the first is {rows.keys[first]!r}, which has {shown}. "
            f"{setting} names this field, so every sample needs it: name another one, or none, or "
            "correct the data set."
        )
    return values


def left_out(rows: Rows) -> LeftOut:
    """Return how many of the rows have a label, text or JSON that no column holds, by reason."""
    labels = {i: label_of(to_bytes(text)) for i, text in rows.label_texts.items()}
    found = {
        "label_not_integer": [i for i, label in labels.items() if label is None],
        "label_minus_one": [i for i, label in labels.items() if label is not None],
        "text_not_utf8": not_utf8(rows.texts),
        "json_invalid": [i for i, it in enumerate(parse_texts(rows.metadata)) if it is INVALID],
    }
    return {
        reason: {"count": len(places), "example": rows.keys[min(places)]}
        for reason, places in found.items()
        if places
    }


def left_out_lines(counts: Iterable[LeftOut]) -> list[str]:
    """Return a line for each reason over several tasks: the sum, and the first example."""
    sums: dict[str, int] = defaultdict(int)
    examples: dict[str, str] = {}
    for reason, found in (item for of_task in counts for item in of_task.items()):
        sums[reason] += found["count"]
        examples.setdefault(reason, found["example"])
    return [
        f"{sums[reason]:,} {words}, such as {examples[reason]}"
        for reason, words in REASONS.items()
        if reason in sums
    ]
