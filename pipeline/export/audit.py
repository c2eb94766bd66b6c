"""The content of one task's files, held against each other, the manifest and the source."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.export.commit import keys_digest
from pipeline.export.finalize import key_index
from pipeline.export.layout import KEYS
from pipeline.export.source import SourceKeys
from pipeline.latents.fields import field_values
from pipeline.writers import BaseWriter, Rows


def audit_task(
    root: Path,
    task: Mapping[str, Any],
    writers: Sequence[BaseWriter],
    source: SourceKeys | None,
) -> tuple[Rows | None, list[str]]:
    """Return the rows of the task's first readable file, and all that is wrong with its files.

    root: a directory with the task's files, named as in the export; one per writer is listed.
    """
    problems: list[str] = []
    found: dict[str, Rows] = {}
    for writer, file in zip(writers, task["files"], strict=True):
        try:
            found[file["path"]] = writer.read(root / file["path"])
        except ValueError as error:
            problems.append(f"{file['path']} cannot be read: {error}")
    for path, rows in found.items():
        problems += (f"{path}: {problem}" for problem in _check_rows(rows, task))
        if source is not None:
            problems += (f"{path}: {problem}" for problem in source.check(task, rows))
    if not found:
        return None, problems
    (first_path, first), *others = found.items()
    problems += (
        f"{path} holds other rows than {first_path}"
        for path, rows in others
        if not _equal(first, rows)
    )
    return first, problems


def _check_rows(rows: Rows, task: Mapping[str, Any]) -> Iterator[str]:
    if len(rows) != task["rows"]:
        yield f"{len(rows)} rows instead of {task['rows']}"
    if keys_digest(rows.keys) != task["keys_sha256"]:
        yield "other keys, or in another order, than was committed"
    failed = [row for row, *_ in task["faults"]]
    if rows.rows[~rows.valid].tolist() != sorted(failed):
        yield "the rows marked as not valid are not the failed rows of the manifest"
    if not all(np.isfinite(values).all() for values in rows.latents.values()):
        yield "latents that are not finite"


def _equal(one: Rows, other: Rows) -> bool:
    """Tell whether two formats hold the same; the columns of one of them are its JSON's fields."""
    arrays = (
        (one.rows, other.rows),
        (one.valid, other.valid),
        (one.labels, other.labels),
        *((one.latents[field], other.latents.get(field)) for field in one.latents),
    )
    texts = [(one.keys, other.keys), (one.metadata, other.metadata), (one.texts, other.texts)]
    for rows in (one, other):
        for name, column in rows.columns.items():
            texts.append((column.values, field_values(rows.metadata, name, column.kind)))
    return all(list(a) == list(b) for a, b in texts) and all(
        b is not None and np.array_equal(a, b) for a, b in arrays
    )


def check_key_index(
    data: bytes, names: Sequence[str], keys: Sequence[Sequence[str]]
) -> Iterator[str]:
    """Yield a problem unless `data`, of `keys.parquet`, leads from every key to its row."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            stored = file.read()
    except (pa.ArrowException, OSError) as error:
        yield f"{KEYS} cannot be read: {error}"
        return
    if stored.to_pydict() != key_index(names, keys).to_pydict():
        yield f"{KEYS} differs from the keys of the files"
