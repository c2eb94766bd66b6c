"""Texts that are not UTF-8 come back byte for byte, from memory and from their escaped form."""

import random

import pytest

from pipeline.common.texts import (
    escaped,
    from_bytes,
    is_utf8,
    not_utf8,
    shown,
    to_bytes,
    unescaped,
)

LATIN_1 = "café".encode("latin-1")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (LATIN_1, r"caf\xe9"),
        (rb"caf\xe9 and " + LATIN_1, r"caf\\xe9 and caf\xe9"),
        (b"\\" + LATIN_1 + b"\\\\", r"\\caf\xe9\\\\"),
        ("é\0".encode() + b"\xed\xa0\x80", "é\0" + r"\xed\xa0\x80"),  # a surrogate, as UTF-8
        ("a".encode("utf-16"), r"\xff\xfea" + "\0"),
    ],
)
def test_other_bytes_than_utf8_are_seen_and_come_back(data: bytes, expected: str):
    text = from_bytes(data)
    assert not is_utf8(text)
    assert escaped(text) == shown(text) == expected
    assert to_bytes(unescaped(expected)) == to_bytes(text) == data


@pytest.mark.parametrize("text", ["", "é", r"caf\xe9", "\0", "\ufffd", "\U0001f600", "\ufeff"])
def test_utf8_stays_as_it_is(text: str):
    assert from_bytes(text.encode()) == shown(text) == text
    assert to_bytes(text) == text.encode()


def test_any_bytes_come_back():
    generator = random.Random(5)
    for _ in range(2000):
        data = bytes(generator.choices(b"\\x0e9\xe9\xc3\xa9\xff\n\0", k=generator.randrange(9)))
        text = from_bytes(data)
        assert to_bytes(text) == data
        assert to_bytes(unescaped(escaped(text))) == data
        assert is_utf8(escaped(text))


def test_the_places_of_those_that_are_not():
    assert not_utf8(["a", None, from_bytes(LATIN_1), "é"]) == [2]
