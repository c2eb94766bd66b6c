"""Checks the content of the files: hashes; rows, against the other formats, the manifest and the
source; then the key index and the statistics, computed from all rows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.files import sha256_file
from pipeline.export.commit import keys_digest
from pipeline.export.finalize import Keys
from pipeline.export.layout import KEYS, MANIFEST, STATISTICS, ExportDir, data_path
from pipeline.export.manifest import ExportManifest, FingerprintOutput, TaskEntry, digest
from pipeline.export.passthrough import left_out
from pipeline.export.statistics import Partial, merge, partial_of, scaling, to_text
from pipeline.export.verify import readers
from pipeline.export.verify.source import SourceKeys
from pipeline.latents.fields import field_values
from pipeline.latents.formats.writers import BaseWriter, Rows


class Audit:
    """Reads every file once, with one task in memory at a time."""

    def __init__(
        self,
        export: ExportDir,
        manifest: ExportManifest,
        *,
        rows: bool,
        statistics: bool,
        source: SourceKeys | None,
    ) -> None:
        """rows, statistics: whether to check them, besides the hashes. source: None = unchecked."""
        self._export, self._manifest, self._source = export, manifest, source
        self._with_rows, self._with_statistics = rows, statistics
        self._output = manifest.output
        self._keys = Keys()
        self._partials: list[Partial] = []

    def problems(self) -> Iterator[str]:
        """Yield all problems."""
        manifest = self._manifest
        if self._source is not None and self._with_rows:
            differences = list(self._source.differences(manifest.data))
            yield from differences or self._source.left_out(manifest.tasks)
            if differences:
                self._source = None  # otherwise each of its keys would be a problem
        for task in manifest.tasks:
            with self._export.store.local_copy([file.path for file in task.files]) as root:
                yield from _check_hashes(root, task)
                if self._with_rows:
                    yield from self._check_rows(root, task)
        sidecars = {name: self._export.store.read(name) for name in (STATISTICS, KEYS)}
        for entry in (manifest.statistics, manifest.keys):
            data = sidecars.get(entry.path)
            if data is not None and digest(data) != entry.sha256:
                yield _other_content(entry.path)
        if self._with_rows:
            yield from self._check_sidecars(sidecars[STATISTICS], sidecars[KEYS])

    def _check_rows(self, root: Path, task: TaskEntry) -> Iterator[str]:
        paths = _paths(task, self._output.formats)
        if not paths:
            yield f"{task.name}: manifest.json lists other files than its formats have"
            return
        rows, problems = _read_rows(root, task, paths, self._output, self._source)
        yield from problems
        if rows is None:
            return
        self._keys.add(rows.keys)
        if self._with_statistics and not any(_unfit(rows, self._output)):
            self._partials.append(partial_of(rows.latents, rows.valid, task.faults))

    def _check_sidecars(self, stored: bytes | None, index: bytes | None) -> Iterator[str]:
        names = [task.name for task in self._manifest.tasks]
        if self._keys.num_tasks < len(names):
            yield "key index and statistics cannot be recomputed, as files cannot be read"
            return
        duplicates, counted = self._keys.num_duplicates(), self._manifest.duplicate_keys
        if duplicates != counted:
            yield f"manifest.json counts {counted} duplicate keys, but the files hold {duplicates}"
        if index is not None:
            yield from _check_key_index(index, names, self._keys)
        if self._with_statistics and stored is not None:
            merged = merge(self._partials)
            if to_text(merged) != stored:
                yield f"{STATISTICS} differs from the statistics of the stored values"
            if self._manifest.statistics.scaling not in (None, scaling(merged)):
                yield f"{MANIFEST} holds another scaling than that of the stored values"


def _check_hashes(root: Path, task: TaskEntry) -> Iterator[str]:
    for file in task.files:
        path = root / file.path
        if path.exists() and sha256_file(path) != file.sha256:
            yield _other_content(file.path)


def _other_content(path: str) -> str:
    return f"{path} has other content than was committed (sha256)"


def _paths(task: TaskEntry, writers: Sequence[BaseWriter]) -> list[list[str]]:
    """Return the files of each writer, main first; an empty list if the task lists others."""
    found = [
        [data_path(writer.kind, task.name, suffix) for suffix in writer.suffixes]
        for writer in writers
    ]
    listed = {file.path for file in task.files}
    return found if listed == {path for paths in found for path in paths} else []


def _read_rows(
    root: Path,
    task: TaskEntry,
    paths: Sequence[Sequence[str]],
    output: FingerprintOutput,
    source: SourceKeys | None,
) -> tuple[Rows | None, list[str]]:
    """Return the rows of the task's first readable file, and the problems of all its files.

    root: a directory with the task's files, named as in the export. paths: those of each format.
    """
    problems: list[str] = []
    found: dict[str, Rows] = {}
    for writer, (path, *beside) in zip(output.formats, paths, strict=True):
        try:
            found[path] = rows = writer.read(root / path)
        except ValueError as error:
            problems.append(f"{path} cannot be read: {error}")
            continue
        problems += (
            f"{path}: {problem}"
            for problem in readers.differences(root, (path, *beside), writer, rows, output)
        )
    for path, rows in found.items():
        problems += (f"{path}: {problem}" for problem in _check_against(rows, task, output))
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


def _unfit(rows: Rows, output: FingerprintOutput) -> Iterator[str]:
    """Yield what is wrong with the latents' fields, shapes or values."""
    shape = output.latent_shape
    for field in output.fields:
        if field not in rows.latents or rows.latents[field].shape[1:] != shape:
            yield f"no {field} of the shape {shape}"
    if not all(np.isfinite(values).all() for values in rows.latents.values()):
        yield "latents that are not finite"


def _check_against(rows: Rows, task: TaskEntry, output: FingerprintOutput) -> Iterator[str]:
    yield from _unfit(rows, output)
    if len(rows) != task.rows:
        yield f"{len(rows)} rows instead of {task.rows}"
    if keys_digest(rows.keys) != task.keys_sha256:
        yield "other keys, or in another order, than was committed"
    failed = [row for row, *_ in task.faults]
    if rows.rows[~rows.valid].tolist() != sorted(failed):
        yield "the rows marked as not valid are not the failed rows of the manifest"
    # Former versions counted nothing, and kept none of it but JSON.
    found = left_out(rows)
    if found != task.left_out and (task.left_out or found.keys() - {"json_invalid"}):
        yield "other labels and texts that are no values than the manifest counts"


def _equal(one: Rows, other: Rows) -> bool:
    """Return whether two formats hold the same rows; columns are compared with the JSON."""
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
    return (
        one.label_texts == other.label_texts
        and all(list(a) == list(b) for a, b in texts)
        and all(b is not None and np.array_equal(a, b) for a, b in arrays)
    )


def _check_key_index(data: bytes, names: Sequence[str], keys: Keys) -> Iterator[str]:
    """Yield a problem unless `data`, of `keys.parquet`, leads from every key to its row."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            stored = file.read()
    except (pa.ArrowException, OSError) as error:
        yield f"{KEYS} cannot be read: {error}"
        return
    if stored.to_pydict() != keys.index(names).to_pydict():
        yield f"{KEYS} differs from the keys of the files"
