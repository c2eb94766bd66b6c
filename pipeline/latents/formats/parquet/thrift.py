"""Structs of Thrift's compact protocol, in which Parquet writes the headers of its pages.

Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _, _STRUCT = range(1, 13)
_INTEGERS = (_I16, _I32, _I64)


def read_struct(data: bytes, place: int = 0) -> tuple[dict[int, Any], int]:
    """Return the fields of the struct at `place` by number, and the place after it.

    Raises ValueError or IndexError when there is none.
    """
    return _struct(data, place)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _zigzag(data: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def _struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[place]
        place += 1
        if head == 0:
            return fields, place
        kind = head & 0x0F
        if head >> 4:
            number += head >> 4
        else:
            number, place = _zigzag(data, place)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], place = _value(kind, data, place)


def _value(kind: int, data: bytes, place: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _zigzag(data, place)
    if kind == _BINARY:
        size, place = _varint(data, place)
        return data[place : place + size], place + size
    if kind == _STRUCT:
        return _struct(data, place)
    raise ValueError(f"a page header holds a field of type {kind}, which none should")
