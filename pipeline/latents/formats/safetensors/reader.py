"""Rows of a safetensors file, by its header, which says where each tensor lies.

Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.latents.files import ByteFile, Bytes
from pipeline.latents.formats.reading import TEXTS, Ints, Layout, ShardReader, gather

LENGTH_BYTES = 8  # of the header's length, before it
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SafetensorsShard(ShardReader):
    """One file of `pipeline.latents.formats.safetensors.writer`."""

    def __init__(self, files: Sequence[ByteFile], layout: Layout) -> None:
        """Read the header."""
        (self._file,), self._layout = files, layout
        length = int.from_bytes(self._file.view(0, LENGTH_BYTES).tobytes(), "little")
        self._start = LENGTH_BYTES + length
        if self._start > self._file.size:
            raise ValueError("is no safetensors file: it ends within its header")
        header = self._file.view(LENGTH_BYTES, length).tobytes()
        self._tensors: dict[str, dict[str, Any]] = json.loads(header)
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
        types = {"valid": "?", "label": "<i8", **{f"{name}_offsets": "<i8" for name in TEXTS}}
        present = {name: kind for name, kind in types.items() if name in self._tensors}
        return {name: self._view(name).view(kind) for name, kind in present.items()}

    def _texts(self, name: str, rows: Ints) -> NDArray[np.object_]:
        found = np.empty(len(rows), np.object_)
        found[:] = ""
        if f"{name}_offsets" in self._small:
            offsets, data = self._small[f"{name}_offsets"], self._view(f"{name}_bytes")
            for i, (lo, hi) in enumerate(zip(offsets[rows], offsets[rows + 1], strict=True)):
                found[i] = data[lo:hi].tobytes().decode()
        return found

    def _view(self, name: str) -> Bytes:
        return self._file.view(*self._range_of(name))

    def _range_of(self, name: str) -> tuple[int, int]:
        begin, end = self._tensors[name]["data_offsets"]
        return self._start + begin, end - begin
