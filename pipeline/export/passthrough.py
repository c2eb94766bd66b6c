"""Labels and columns from fields of the samples' JSON.

Rows with `metadata` -> label by `data.label_field`, columns by `columns` -> Rows

Every valid row must have them. A missing value is a mistake in the settings or the data set, which
is reported before the task is committed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.latents.fields import parse_texts, typed_values
from pipeline.latents.formats.writers import NO_LABEL, Column, ColumnType, Rows

SHOWN = 80  # characters of a sample's JSON in a message


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
            rows = replace(rows, labels=np.array(labels, np.int64))
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
