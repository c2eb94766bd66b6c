"""Rows of a safetensors file, by its header, which says where each tensor lies.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.texts import from_bytes, shown
from pipeline.latents.files import ByteFile, Bytes
from pipeline.latents.formats.reading import (
    LABEL_TEXT,
    Ints,
    Layout,
    ShardReader,
    gather,
    sparse,
)
from pipeline.latents.rows import TEXTS

LENGTH_BYTES = 8  # of the header's length, before it
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NUMPY_TYPES = {
    "I64": np.int64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,  # its bits
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict[str, Any], int]:
    """Return dtype, shape and data_offsets of the tensors by name, and where their bytes begin.

    read: (offset, size) -> bytes of a file of `size` bytes. Raises ValueError, KeyError, TypeError
    or RecursionError unless the tensors fill the file without gaps.
    """
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    start, end = LENGTH_BYTES + length, 0
    if start > size:
        raise ValueError("is no safetensors file: it ends within its header")
    tensors: Any = json.loads(read(LENGTH_BYTES, length))
    if not isinstance(tensors, dict):
        raise ValueError("is no safetensors file: its header is no mapping")
    tensors.pop("__metadata__", None)
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, next_end = tensor["data_offsets"]
        num_bytes = math.prod(tensor["shape"]) * np.dtype(NUMPY_TYPES[tensor["dtype"]]).itemsize
        if (begin, next_end) != (end, end + num_bytes):
            raise ValueError(f"holds {name} as {tensor}, which should begin at byte {end}")
        end = next_end
    if size != start + end:
        raise ValueError(f"has {size} bytes instead of {start + end}")
    return tensors, start


class SafetensorsShard(ShardReader):
    """One file of `pipeline.latents.formats.safetensors.writer`."""

    def __init__(self, files: Sequence[ByteFile], layout: Layout) -> None:
        """Read the header."""
        (self._file,), self._layout = files, layout
        self._tensors, self._start = read_header(
            lambda offset, size: self._file.view(offset, size).tobytes(), self._file.size
        )
        needed = {"valid", "label", "key_bytes", "key_offsets", *layout.fields}
        if not needed <= set(self._tensors):
            raise ValueError(f"lacks the tensors {sorted(needed - set(self._tensors))}")
        for field in layout.fields:
            found = self._tensors[field]
            if (found["dtype"], found["shape"][1:]) != (TYPES[layout.dtype], list(layout.shape)):
                raise ValueError(f"holds {field} as {found}, where the manifest has {layout}")

    def __len__(self) -> int:
        return self._tensors["label"]["shape"][0]

    def column(self, name: str, rows: Ints) -> NDArray[Any]:
        if name == LABEL_TEXT:
            places = self._small.get("label_text_rows", np.zeros(0, np.int64))
            texts = self._texts(name, np.arange(len(places)))
            return sparse(dict(zip(places.tolist(), texts, strict=True)), rows)
        if name not in TEXTS:
            return self._small[name][rows]
        texts = self._texts(name, rows)
        if name != "key":
            texts[texts == ""] = None
        return texts

    def latents(self, field: str, rows: Ints) -> NDArray[Any]:
        offset, size = self._range_of(field)
        if size != len(self) * self._layout.row_bytes:
            raise ValueError(f"holds {size} bytes of {field}")
        found = gather(self._file, offset, len(self), rows, self._layout.row_bytes)
        return self._layout.to_array(found)

    @cached_property
    def _small(self) -> dict[str, NDArray[Any]]:
        """The columns that are not texts, and the offsets of the texts."""
        types = {"valid": "?", "label": "<i8", "label_text_rows": "<i8"}
        types |= {f"{name}_offsets": "<i8" for name in (*TEXTS, LABEL_TEXT)}
        present = {name: kind for name, kind in types.items() if name in self._tensors}
        return {name: self._view(name).view(kind) for name, kind in present.items()}

    def _texts(self, name: str, rows: Ints) -> NDArray[np.object_]:
        found = np.empty(len(rows), np.object_)
        found[:] = ""
        if f"{name}_offsets" in self._small:
            offsets, data = self._small[f"{name}_offsets"], self._view(f"{name}_bytes")
            for i, (lo, hi) in enumerate(zip(offsets[rows], offsets[rows + 1], strict=True)):
                found[i] = shown(from_bytes(data[lo:hi].tobytes()))
        return found

    def _view(self, name: str) -> Bytes:
        return self._file.view(*self._range_of(name))

    def _range_of(self, name: str) -> tuple[int, int]:
        begin, end = self._tensors[name]["data_offsets"]
        return self._start + begin, end - begin
