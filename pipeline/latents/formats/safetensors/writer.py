"""safetensors: one file of tensors per task, the one format that holds bfloat16.

    mu, logvar or z, ..._hflip   [n, *latent] F32, F16 or BF16; those that are stored
    row, label                   [n] I64; label -1 = none
    valid                        [n] BOOL
    key_bytes, key_offsets       [bytes] U8, [n + 1] I64: key i is the UTF-8 text in
                                 key_bytes[key_offsets[i] : key_offsets[i + 1]]
    metadata_bytes, _offsets     the same for the JSON texts, and text_bytes, text_offsets for the
                                 plain texts, with the source's bytes where they are not UTF-8;
                                 empty = none; left out if no row has any
    label_text_rows              [k] I64: rows whose label is -1 although the source's `.cls` has a
                                 text, which is no integer or -1; label_text_bytes, _offsets [k + 1]
                                 hold these texts; left out if there is none

The texts are tensors since the header is JSON that every reader parses whole and that ends at
100 MB. The file is written and read here and not by the library, whose `serialize` copies all
tensors twice in memory, and which a light installation lacks.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.texts import from_bytes, to_bytes
from pipeline.latents.formats.safetensors.reader import LENGTH_BYTES, NUMPY_TYPES, read_header
from pipeline.latents.formats.writing import FIELDS, BaseWriter, Dtype, Rows

_NAMES = {np.dtype(kind): name for name, kind in NUMPY_TYPES.items()}


class SafetensorsWriter(BaseWriter):
    """A file of tensors with the stem of the source shard."""

    kind: Literal["safetensors"] = "safetensors"

    @property
    def suffix(self) -> str:
        return ".safetensors"

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        return ("float32", "float16", "bfloat16")

    def write(self, path: Path, rows: Rows) -> None:
        tensors = _tensors(rows)
        with path.open("xb") as file:
            file.write(_header(tensors, list(rows.latents)))
            for array in tensors.values():
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: Path) -> Rows:
        try:
            return _rows(path.stem, path.read_bytes())
        except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name} cannot be read: {error!r}") from error


def to_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper halves of float32 numbers, which are bfloat16 if the lower ones are zero."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "rows.bfloat16 promises numbers that bfloat16 holds"
    return (bits >> 16).astype(np.uint16)


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 numbers as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _tensors(rows: Rows) -> dict[str, NDArray[Any]]:
    """Return all tensors in the sequence of the file; bfloat16 as its bits."""
    tensors: dict[str, NDArray[Any]] = {
        "row": rows.rows.astype(np.int64),
        "label": rows.labels.astype(np.int64),
        "valid": rows.valid,
        **_pack("key", rows.keys),
    }
    for name, texts in (("metadata", rows.metadata), ("text", rows.texts)):
        if any(text is not None for text in texts):
            tensors |= _pack(name, [text or "" for text in texts])
    if rows.label_texts:
        tensors["label_text_rows"] = np.array(list(rows.label_texts), np.int64)
        tensors |= _pack("label_text", list(rows.label_texts.values()))
    for field, values in rows.latents.items():
        tensors[field] = to_bits(values) if rows.bfloat16 else np.ascontiguousarray(values)
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    return {name: tensors[name] for name in names}


def _header(tensors: Mapping[str, NDArray[Any]], fields: Sequence[str]) -> bytes:
    """Return what precedes the tensors' bytes: the JSON's length, and the JSON."""
    ours = json.dumps({"version": 1, "fields": fields})
    header: dict[str, Any] = {"__metadata__": {"latentmill": ours}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8, the largest of a number
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _pack(name: str, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
    encoded = [to_bytes(text) for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {
        f"{name}_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}_offsets": offsets,
    }


def _unpack(name: str, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    data, offsets = arrays[f"{name}_bytes"].tobytes(), arrays[f"{name}_offsets"].tolist()
    return [from_bytes(data[lo:hi]) for lo, hi in pairwise(offsets)]


def _rows(shard: str, data: bytes) -> Rows:
    tensors, start = read_header(lambda offset, size: data[offset : offset + size], len(data))
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        begin, end = tensor["data_offsets"]
        content = np.frombuffer(data[start + begin : start + end], NUMPY_TYPES[tensor["dtype"]])
        arrays[name] = content.reshape(tensor["shape"])
    keys = _unpack("key", arrays)
    metadata, texts = (
        _unpack(name, arrays) if f"{name}_bytes" in arrays else [""] * len(keys)
        for name in ("metadata", "text")
    )
    label_texts: dict[int, str] = {}
    if "label_text_rows" in arrays:
        found = zip(arrays["label_text_rows"].tolist(), _unpack("label_text", arrays), strict=True)
        label_texts.update(found)
    latents = {field: arrays[field] for field in FIELDS if field in arrays}
    is_bfloat16 = tensors["z" if "z" in latents else "mu"]["dtype"] == "BF16"
    columns = (metadata, texts, arrays["row"], arrays["valid"], arrays["label"], *latents.values())
    if any(len(column) != len(keys) for column in columns):
        raise ValueError(f"{len(keys)} keys, but {[len(column) for column in columns]} of others")
    return Rows(
        shard=shard,
        keys=keys,
        rows=arrays["row"],
        valid=arrays["valid"],
        labels=arrays["label"],
        metadata=[text or None for text in metadata],
        texts=[text or None for text in texts],
        latents={f: from_bits(v) if is_bfloat16 else v for f, v in latents.items()},
        bfloat16=is_bfloat16,
        label_texts=label_texts,
    )
