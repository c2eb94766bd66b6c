"""Rows of a webdataset tar, by the headers of its members: a `.npy` ends with the row's values.

A remote tar is fetched as one range, and kept while the cache has room.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.labels import NO_LABEL, label_of
from pipeline.common.texts import from_bytes, shown
from pipeline.latents.files import ByteFile
from pipeline.latents.formats.reading import Ints, Layout, ShardReader

BLOCK = 512  # ustar: headers and contents begin at multiples
PAX_TYPE = 120  # "x": a header that holds the next member's name, which is too long for ustar
NPY_MAGIC = b"\x93NUMPY"
NO_CLASS = str(NO_LABEL).encode()


class TarShard(ShardReader):
    """One file of `pipeline.latents.formats.tar.writer`: ustar, members grouped by sample."""

    def __init__(self, files: Sequence[ByteFile], layout: Layout) -> None:
        """Read all headers."""
        (self._file,), self._layout = files, layout
        self._keys: list[str] = []
        self._members: list[dict[str, tuple[int, int]]] = []  # suffix -> offset and size
        data = self._file.view(0, self._file.size).data  # indexed faster than the array
        position, long_name = 0, ""
        while position + BLOCK <= len(data) and data[position]:
            header = data[position : position + BLOCK].tobytes()
            try:
                size = int(header[124:135], 8)
                name, folder = _text(header[:100]), _text(header[345:500])
            except ValueError:
                raise ValueError(f"holds no tar header at byte {position}") from None
            start = position + BLOCK
            position = start + -(-size // BLOCK) * BLOCK
            if header[156] == PAX_TYPE:
                long_name = _long_name(data[start - BLOCK : position + BLOCK])
                continue
            self._add(long_name or (f"{folder}/{name}" if folder else name), start, size)
            long_name = ""
        if not self._keys or position > len(data) - 2 * BLOCK:
            raise ValueError("ends early: it has no end marker")

    def __len__(self) -> int:
        return len(self._keys)

    def column(self, name: str, rows: Ints) -> NDArray[Any]:
        values = [self._value(name, number) for number in rows.tolist()]
        return np.array(values, {"valid": np.bool_, "label": np.int64}.get(name, np.object_))

    def latents(self, field: str, rows: Ints) -> NDArray[Any]:
        layout, data = self._layout, self._file.view(0, self._file.size)
        row_bytes = layout.row_bytes
        out = np.empty((len(rows), row_bytes), np.uint8)
        for position, number in enumerate(rows.tolist()):
            offset, size = self._members[number].get(f"{field}.npy", (0, 0))
            if size <= row_bytes or data[offset : offset + 6].tobytes() != NPY_MAGIC:
                raise ValueError(f"holds no {field} of {self._keys[number]}")
            out[position] = data[offset + size - row_bytes : offset + size]
        return layout.to_array(out)

    def _add(self, name: str, offset: int, size: int) -> None:
        """Store a member; key and suffix are split at the first dot of its base name."""
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = f"{folder}{slash}{stem}"
        if not self._keys or self._keys[-1] != key or suffix in self._members[-1]:
            self._keys.append(key)
            self._members.append({})
        self._members[-1][suffix] = offset, size

    def _value(self, name: str, number: int) -> Any:
        if name == "key":
            return self._keys[number]
        if name == "valid":
            return self._row(number)["valid"]
        if name in ("label", "label_text"):
            content = self._content(number, "cls", NO_CLASS)
            label = label_of(content)
            if name == "label":
                return NO_LABEL if label is None else label
            is_text = label is None or "label" in self._row(number)
            return shown(from_bytes(content)) if is_text else None
        if name == "text":
            return shown(from_bytes(self._content(number, "txt", b""))) or None
        text = shown(from_bytes(self._content(number, "json", b"null")))
        return None if text == "null" else text

    def _row(self, number: int) -> dict[str, Any]:
        return json.loads(self._content(number, "row.json"))

    def _content(self, number: int, suffix: str, default: bytes | None = None) -> bytes:
        if suffix not in self._members[number]:
            if default is None:
                raise ValueError(f"holds no {suffix} of {self._keys[number]}")
            return default
        offset, size = self._members[number][suffix]
        return self._file.view(0, self._file.size)[offset : offset + size].tobytes()


def _long_name(headers: memoryview) -> str:
    """The name that a PAX header gives the member behind it."""
    try:
        with tarfile.open(fileobj=io.BytesIO(headers), mode="r:") as tar:
            member = tar.next()
    except tarfile.TarError as error:
        raise ValueError(f"holds a PAX header that cannot be read: {error}") from error
    return "" if member is None else member.name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()
