"""What files and manifest hold: well formed, and one task's files equal to each other, to what the
manifest says, and to the source.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipeline.export.commit import keys_digest
from pipeline.export.finalize import Keys
from pipeline.export.layout import KEYS
from pipeline.export.source import SourceKeys
from pipeline.latents.fields import field_values
from pipeline.writers import BaseWriter, Rows, Writer


@dataclass(frozen=True)
class _Named:
    path: str
    sha256: str


@dataclass(frozen=True)
class _File(_Named):
    bytes: int


@dataclass(frozen=True)
class _Task:
    name: str
    source: str
    rows: int
    faults: list[tuple[int, str, str, str]]
    keys_sha256: str
    files: list[_File]


@dataclass(frozen=True)
class _Data:
    dataset_id: str
    split: str


@dataclass(frozen=True)
class _Output:
    fields: list[str]
    latent_shape: list[int]
    formats: list[Writer]


@dataclass(frozen=True)
class _Fingerprint:
    data: _Data
    output: _Output


@dataclass(frozen=True)
class _Manifest:
    fingerprint: _Fingerprint
    rows: int
    failed_rows: int
    duplicate_keys: int
    tasks: list[_Task]
    statistics: _Named
    keys: _Named


def malformed(manifest: Mapping[str, Any]) -> str | None:
    """Say what `verify` needs of a manifest and does not find; None if nothing is wrong."""
    try:
        TypeAdapter(_Manifest).validate_json(json.dumps(manifest))
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None


def audit_task(
    root: Path,
    task: Mapping[str, Any],
    output: Mapping[str, Any],
    writers: Sequence[BaseWriter],
    source: SourceKeys | None,
) -> tuple[Rows | None, list[str]]:
    """Return the rows of the task's first readable file, and all that is wrong with its files.

    root: a directory with the task's files, named as in the export; one per writer is listed.
    output: of the manifest's fingerprint.
    """
    problems: list[str] = []
    found: dict[str, Rows] = {}
    for writer, file in zip(writers, task["files"], strict=True):
        try:
            found[file["path"]] = writer.read(root / file["path"])
        except ValueError as error:
            problems.append(f"{file['path']} cannot be read: {error}")
    for path, rows in found.items():
        problems += (f"{path}: {problem}" for problem in _check_rows(rows, task, output))
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


def unfit(rows: Rows, output: Mapping[str, Any]) -> Iterator[str]:
    """Yield how latents are not those of an export with such an output."""
    shape = tuple(output["latent_shape"])
    for field in output["fields"]:
        if field not in rows.latents or rows.latents[field].shape[1:] != shape:
            yield f"no {field} of the shape {shape}"
    if not all(np.isfinite(values).all() for values in rows.latents.values()):
        yield "latents that are not finite"


def _check_rows(rows: Rows, task: Mapping[str, Any], output: Mapping[str, Any]) -> Iterator[str]:
    yield from unfit(rows, output)
    if len(rows) != task["rows"]:
        yield f"{len(rows)} rows instead of {task['rows']}"
    if keys_digest(rows.keys) != task["keys_sha256"]:
        yield "other keys, or in another order, than was committed"
    failed = [row for row, *_ in task["faults"]]
    if rows.rows[~rows.valid].tolist() != sorted(failed):
        yield "the rows marked as not valid are not the failed rows of the manifest"


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


def check_key_index(data: bytes, names: Sequence[str], keys: Keys) -> Iterator[str]:
    """Yield a problem unless `data`, of `keys.parquet`, leads from every key to its row."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            stored = file.read()
    except (pa.ArrowException, OSError) as error:
        yield f"{KEYS} cannot be read: {error}"
        return
    if stored.to_pydict() != keys.index(names).to_pydict():
        yield f"{KEYS} differs from the keys of the files"
