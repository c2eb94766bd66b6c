"""Typed values of a field of the samples' JSON; the same rule for writing and reading."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.texts import is_utf8

FieldType = Literal["int64", "float64", "string", "bool"]

INVALID = object()  # the value of a text that is no JSON
BYTE_ORDER_MARK = "\ufeff"  # Windows' programs put it before a text
# Replaces a missing value, which only invalid rows may have.
_NOTHING: dict[FieldType, Any] = {"int64": 0, "float64": 0.0, "string": "", "bool": False}


def parse_texts(texts: Sequence[str | None]) -> list[Any]:
    """Return the value of each JSON text; None for a missing text, INVALID for no JSON.

    As Python reads it: NaN is a number, and of a name that occurs twice the last value counts.
    """
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
        return json.loads(text.removeprefix(BYTE_ORDER_MARK)) if is_utf8(text) else INVALID
    except (ValueError, RecursionError):  # no JSON, or thousands of brackets in one another
        return INVALID


def _look_up(value: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _typed(value: Any, kind: FieldType) -> Any:
    if kind == "bool":
        return value if isinstance(value, bool) else None
    if kind == "string":
        # JSON's escapes can say what no UTF-8 text holds.
        return value if isinstance(value, str) and is_utf8(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind == "int64":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    return float(value) if abs(value) <= sys.float_info.max else None
