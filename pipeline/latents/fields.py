"""Typed values of a field of the samples' JSON; the same rule for writing and reading."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FieldType = Literal["int64", "float64", "string", "bool"]

_SURROGATE = re.compile("[\ud800-\udfff]")  # valid as JSON escapes, but not in UTF-8
# Replaces a missing value, which only invalid rows may have.
_NOTHING: dict[FieldType, Any] = {"int64": 0, "float64": 0.0, "string": "", "bool": False}


def parse_texts(texts: Sequence[str | None]) -> list[Any]:
    """Return the value of each JSON text; None for a missing or invalid text."""
    return [None if text is None else _parse(text) for text in texts]


def typed_values(parsed: Sequence[Any], name: str, kind: FieldType) -> list[Any]:
    """Return the value of a field in each parsed text; None if missing or of another type.

    name: dots separate nested objects, as in a split's `json.FIELD`.
    """
    parts = name.split(".")
    return [_typed(_look_up(value, parts), kind) for value in parsed]


def field_values(texts: Sequence[str | None], name: str, kind: FieldType) -> list[Any]:
    """Return the `typed_values` of one field in JSON texts."""
    return typed_values(parse_texts(texts), name, kind)


def field_array(texts: Sequence[str | None], name: str, kind: FieldType) -> NDArray[Any]:
    """Return the values [n] as an array, strings as objects; a missing one is 0, "" or False."""
    values = field_values(texts, name, kind)
    filled = [_NOTHING[kind] if value is None else value for value in values]
    return np.array(filled, np.object_ if kind == "string" else kind)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _look_up(value: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _typed(value: Any, kind: FieldType) -> Any:
    if kind == "bool":
        return value if isinstance(value, bool) else None
    if kind == "string":
        return value if isinstance(value, str) and not _SURROGATE.search(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind == "int64":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    return float(value) if abs(value) <= sys.float_info.max else None
