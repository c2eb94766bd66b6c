"""Whether others read a task's files, and whether `LatentDataset` finds the same in them.

writer.read      by the format's own reader: tarfile, pyarrow and numpy read the files whole
safetensors      writer.read is our own parser, so the library reads the file, too, if it is here
READERS          LatentDataset's way: headers, pages and byte ranges

Each of them may take a file that another refuses, or read something else from it.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.texts import shown
from pipeline.export.manifest import FingerprintOutput
from pipeline.latents.files import FAULTS, LocalFiles
from pipeline.latents.formats import READERS
from pipeline.latents.formats.reading import COLUMNS, LABEL_TEXT, Layout
from pipeline.latents.formats.safetensors.reader import read_header
from pipeline.latents.formats.writers import BaseWriter, Rows

LIBRARY = "safetensors"


def library_is_missing() -> bool:
    """Return whether the safetensors library cannot be imported, as in a light installation."""
    return _library() is None


def _library() -> Any:
    try:
        return import_module(LIBRARY)
    except ImportError:
        return None


def differences(
    root: Path, paths: Sequence[str], writer: BaseWriter, rows: Rows, output: FingerprintOutput
) -> Iterator[str]:
    """Yield how other readers differ from `rows`, which `writer` has read.

    root: a directory with the files; paths: of one task and format, the main file first.
    """
    if writer.kind == LIBRARY:
        yield from _by_the_library(root / paths[0])
    expected = {
        "key": rows.keys,
        "metadata": [shown(text) for text in rows.metadata],
        "text": [shown(text) for text in rows.texts],
        "valid": rows.valid.tolist(),
        "label": rows.labels.tolist(),
        LABEL_TEXT: [shown(rows.label_texts.get(i)) for i in range(len(rows))],
    }
    numbers = np.arange(len(rows))
    layout = Layout(tuple(output.fields), output.latent_shape, output.dtype)
    try:
        files = LocalFiles(root)
        reader = READERS[writer.kind]([files.open(path) for path in paths], layout)
        other = [
            name for name in COLUMNS if reader.column(name, numbers).tolist() != expected[name]
        ]
        other += [
            field
            for field in rows.latents
            if not np.array_equal(reader.latents(field, numbers), rows.latents[field])
        ]
    except (*FAULTS, OSError) as error:
        yield f"LatentDataset cannot read it: {error}"
        return
    if len(reader) != len(rows) or other:
        names = ", ".join(other) or "another number of rows"
        yield f"LatentDataset reads other values ({names}) than the format's own reader"


def _by_the_library(path: Path) -> Iterator[str]:
    """Yield how the library's tensors differ from those of our parser, byte for byte."""
    library = _library()
    if library is None:
        return
    data = path.read_bytes()
    try:
        found = {
            name: (tensor["dtype"], list(tensor["shape"]), tensor["data"])
            for name, tensor in library.deserialize(data)
        }
    except library.SafetensorError as error:
        yield f"the safetensors library cannot read it: {error}"
        return
    tensors, start = read_header(lambda offset, size: data[offset : offset + size], len(data))
    for name, tensor in tensors.items():
        begin, end = (start + offset for offset in tensor["data_offsets"])
        ours = (tensor["dtype"], list(tensor["shape"]), data[begin:end])
        if found.get(name) != ours:
            yield f"the safetensors library reads another tensor {name}"
