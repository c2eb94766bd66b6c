"""manifest.json: every file of an export with its hash, every failed row; written by `finalize`.

Readers of latents use `pipeline.latents.manifest`, which reads a few values without these checks.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from pipeline.export.commit import Fault, FileRecord
from pipeline.latents.formats.writers import Writer
from pipeline.latents.manifest import FORMAT


@dataclass(frozen=True)
class TaskEntry:
    """One task: a source shard, and the files made from it."""

    name: str
    source: str  # file name of the shard
    source_sha256: str
    rows: int
    faults: list[Fault]
    keys_sha256: str
    files: list[FileRecord]
    # As in the commit record; not written where it is empty.
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


@dataclass(frozen=True)
class Sidecar:
    """A file beside the manifest."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Statistics(Sidecar):
    """The statistics file; `scaling` is copied here for readers that need nothing else."""

    scaling: dict[str, Any] | None = None  # None in exports by 93dd2d6


@dataclass(frozen=True)
class ExportManifest:
    """The content of manifest.json."""

    fingerprint: Mapping[str, Any]  # of the plan; a repeated export must have the same
    rows: int
    failed_rows: int
    duplicate_keys: int
    tasks: list[TaskEntry]
    statistics: Statistics
    keys: Sidecar

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a file's content; raises ValueError with what is wrong."""
        try:
            values = json.loads(data)
        except ValueError as error:
            raise ValueError(f"is no JSON: {error}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"is not of the format {FORMAT!r}")
        try:
            _FINGERPRINT.validate_python(values)
            return TypeAdapter(cls).validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"is not what an export writes: {where}: {first['msg']}") from None

    def to_text(self) -> bytes:
        """Return the file's content."""
        values: dict[str, Any] = {**asdict(self), "format": FORMAT}
        for task in values["tasks"]:
            if not task["left_out"]:
                del task["left_out"]
        return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @property
    def data(self) -> "FingerprintData":
        """The data set that was encoded."""
        return TypeAdapter(FingerprintData).validate_python(self.fingerprint["data"])

    @property
    def output(self) -> "FingerprintOutput":
        """What the files of the export contain."""
        return TypeAdapter(FingerprintOutput).validate_python(self.fingerprint["output"])

    def files(self) -> Iterator[FileRecord | Sidecar]:
        """Yield every file but the manifest and _SUCCESS."""
        for task in self.tasks:
            yield from task.files
        yield from (self.statistics, self.keys)


@dataclass(frozen=True)
class FingerprintData:
    """The values of the fingerprint's part `data` that `verify` needs."""

    dataset_id: str
    split: str  # by pipeline.data.index.Index.split_identity


@dataclass(frozen=True)
class FingerprintOutput:
    """The values of the fingerprint's part `output` that `verify` needs."""

    fields: list[str]
    latent_shape: tuple[int, ...]
    dtype: str
    formats: list[Writer]


@dataclass(frozen=True)
class _Fingerprint:
    data: FingerprintData
    output: FingerprintOutput


@dataclass(frozen=True)
class _Whole:
    fingerprint: _Fingerprint


_FINGERPRINT = TypeAdapter(_Whole)


def digest(data: bytes) -> str:
    """Return the hash that _SUCCESS and the manifest have of a file's content."""
    return hashlib.sha256(data).hexdigest()
