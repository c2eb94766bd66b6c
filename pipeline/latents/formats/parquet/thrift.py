"""Parser of structs in Thrift's compact protocol, which Parquet uses for page headers.

Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _, _STRUCT = range(1, 13)
_INTEGERS = (_I16, _I32, _I64)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _zigzag(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def read_struct(data: bytes, position: int = 0) -> tuple[dict[int, Any], int]:
    """Return the fields of the struct at `position` by number, and the position after it.

    Raises ValueError, IndexError or, for deep nesting, RecursionError if there is none.
    """
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[position]
        position += 1
        if head == 0:
            return fields, position
        kind = head & 0x0F
        if head >> 4:
            number += head >> 4
        else:
            number, position = _zigzag(data, position)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], position = _value(kind, data, position)


def _value(kind: int, data: bytes, position: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _zigzag(data, position)
    if kind == _BINARY:
        size, position = _varint(data, position)
        return data[position : position + size], position + size
    if kind == _STRUCT:
        return read_struct(data, position)
    raise ValueError(f"a page header holds a field of type {kind}, which none should")
