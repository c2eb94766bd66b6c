"""Typed values of a field of the samples' JSON; one rule for who writes and who reads them."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FieldType = Literal["int64", "float64", "string", "bool"]

_SURROGATE = re.compile("[\ud800-\udfff]")  # escaped in JSON, but no text: UTF-8 has none
# What stands for a value that a row lacks, which only a row that is not valid may.
_NOTHING: dict[FieldType, Any] = {"int64": 0, "float64": 0.0, "string": "", "bool": False}


def field_values(texts: Sequence[str | None], name: str, kind: FieldType) -> list[Any]:
    """Return the value of a field in each JSON text; None where it has none of this type.

    name: dots lead into objects, as in a split's `json.FIELD`.
    """
    return [None if text is None else _value(text, name, kind) for text in texts]


def field_array(texts: Sequence[str | None], name: str, kind: FieldType) -> NDArray[Any]:
    """Return the values [n] as an array, strings as objects; a missing one is 0, "" or False."""
    values = field_values(texts, name, kind)
    filled = [_NOTHING[kind] if value is None else value for value in values]
    return np.array(filled, np.object_ if kind == "string" else kind)


def _value(text: str, name: str, kind: FieldType) -> Any:
    try:
        value: Any = json.loads(text)
    except ValueError:
        return None
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if kind == "bool":
        return value if isinstance(value, bool) else None
    if kind == "string":
        return value if isinstance(value, str) and not _SURROGATE.search(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind == "int64":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    return float(value) if abs(value) <= sys.float_info.max else None
