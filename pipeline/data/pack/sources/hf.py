"""Hugging Face data sets that are on this machine; nothing is downloaded.

name or folder --`find_files`--> Parquet or Arrow files, each of one split -> columns by their types
rows of a file -> picture, `.cls` (label), `.txt` (text), `.json` (all other values)

A key is the row's number in its split, or what `key` names; those of several splits begin with the
split's name.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic_core import to_json

from pipeline.common.errors import UserError
from pipeline.common.explain import did_you_mean
from pipeline.common.files import canonical_json
from pipeline.data.pack import hub_rows
from pipeline.data.pack.hub_files import find_files
from pipeline.data.pack.hub_rows import FileRows
from pipeline.data.pack.keys import key_of
from pipeline.data.pack.sources.base import Broken, Picture, PictureSource, Sample, require_positive

MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


@dataclass(frozen=True)
class Columns:
    """What each column of the data set becomes."""

    image: str
    label: str | None
    text: str | None
    key: str | None
    others: tuple[str, ...]  # into the JSON
    dropped: tuple[str, ...]  # what JSON cannot hold

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        single = filter(None, (self.image, self.label, self.text, self.key))
        return list(dict.fromkeys([*single, *self.others]))


def _key(value: Any) -> str:
    text = "" if value is None else str(value)
    if not text.rpartition("/")[2]:
        raise ValueError(f"the row's key is {value!r}")
    return text


@dataclass(frozen=True)
class HubPart:
    """Rows of one or several files."""

    root: Path
    rows: tuple[FileRows, ...]
    columns: Columns
    classes: tuple[str, ...]
    settings: "HuggingFace"

    def read(self) -> Iterator[Sample | Broken]:
        """Yield the samples in order; a row without a picture is broken."""
        columns = self.columns
        labels = {name: label for label, name in enumerate(self.classes)}
        for rows in self.rows:
            for number, row in rows.read(columns.names):
                key = key_of(f"{rows.prefix}{number:09d}")
                try:
                    if columns.key is not None:
                        key = key_of(f"{rows.prefix}{_key(row[columns.key])}")
                    picture = self._picture(key, rows.path, row[columns.image])
                except ValueError as error:
                    yield Broken(key, str(error))
                else:
                    yield Sample(key, self._members(row, labels), picture)

    def _picture(self, key: str, rows: Path, value: Any) -> Picture:
        content, path = hub_rows.picture_of(value)
        if not content and not path:
            raise ValueError("the row holds no picture")
        if not content:
            file = hub_rows.file_of(self.root, rows, path or "")
            try:
                content = file.read_bytes()
            except OSError as error:
                raise ValueError(f"{file.name} cannot be read: {error.strerror}") from error
        suffix = next((s for magic, s in MAGIC.items() if content.startswith(magic)), None)
        if suffix is None:
            raise ValueError("the picture is no JPEG, PNG or WebP")
        return Picture(key, suffix, content, self.settings.resize, self.settings.max_pixels)

    def _members(self, row: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, bytes]:
        columns, members = self.columns, dict[str, bytes]()
        label = row[columns.label] if columns.label else None
        label = labels[label] if isinstance(label, str) else label
        if label not in (None, -1):  # `datasets` writes -1 where there is none
            members["cls"] = str(int(label)).encode()
        text = row[columns.text] if columns.text else None
        if text is not None:
            members["txt"] = text.encode()
        others = {name: row[name] for name in columns.others}
        path = hub_rows.picture_of(row[columns.image])[1]
        if path is not None:  # an absolute one means nothing on other machines
            others.setdefault("path", Path(path).name if Path(path).is_absolute() else path)
        if others:
            members["json"] = to_json(others, inf_nan_mode="strings", fallback=str)
        return members


@dataclass(frozen=True)
class HubSamples:
    """All rows of the chosen splits."""

    root: Path
    files: tuple[FileRows, ...]  # whole ones
    file_sizes: tuple[Sequence[int], ...]  # of each file's rows
    columns: Columns
    classes: tuple[str, ...]  # names of the labels, if they are known
    settings: "HuggingFace"

    @property
    def ignored(self) -> Mapping[str, int]:
        """Columns that are not packed, with the number of their values."""
        return {f"column {name}": len(self) for name in self.columns.dropped}

    def __len__(self) -> int:
        return sum(map(len, self.file_sizes))

    def sizes(self) -> Sequence[int]:
        return [size for sizes in self.file_sizes for size in sizes]

    def identity(self) -> Mapping[str, Any]:
        """Return the settings and a digest of the sizes of files and rows; paths do not count."""
        listing = [
            [
                file.prefix,
                file.path.stat().st_size,
                sha256(np.array(sizes, "<i8").tobytes()).hexdigest(),
            ]
            for file, sizes in zip(self.files, self.file_sizes, strict=True)
        ]
        return {
            **self.settings.model_dump(include={"kind", "image", "label", "text", "key"}),
            "version": 1,
            "rows": len(self),
            "listing_sha256": sha256(canonical_json(listing)).hexdigest(),
            **self.settings.picture_identity(),
        }

    def sidecars(self) -> Mapping[str, bytes]:
        names = json.dumps(self.classes) + "\n"
        return {"classes.json": names.encode()} if self.classes else {}

    def part(self, lo: int, hi: int) -> HubPart:
        """Return rows lo..hi-1."""
        starts = accumulate(map(len, self.file_sizes), initial=0)
        rows = [
            FileRows(f.path, max(lo - start, 0), min(hi - start, f.hi), f.first, f.prefix)
            for start, f in zip(starts, self.files, strict=False)
            if start < hi and lo < start + f.hi
        ]
        return HubPart(self.root, tuple(rows), self.columns, self.classes, self.settings)


class HuggingFace(PictureSource):
    """Settings of a data set of `datasets`."""

    HELP: ClassVar[str] = "a Hugging Face data set on this machine (Parquet, Arrow, caches)"

    kind: Literal["hf"] = "hf"
    source: Path = Field(description="folder, or name of a data set in the caches")
    image: str | None = Field(default=None, description="column of the pictures")
    label: str | None = Field(default=None, description="column of the classes")
    text: str | None = Field(default=None, description="column for .txt")
    key: str | None = Field(default=None, description="column of keys; else numbers")
    source_split: str | None = Field(
        default=None, description="split of the data set; else all, in front of the keys"
    )

    def open(self) -> HubSamples:
        """Find the rows; raises UserError if there are none, and for unclear columns."""
        require_positive(resize=self.resize, max_pixels=self.max_pixels)
        root, found = find_files(str(self.source))
        splits = sorted({file.split for file in found})
        if self.source_split is not None and self.source_split not in splits:
            raise UserError(f"{self.source} has no split {self.source_split}: {', '.join(splits)}.")
        chosen = [f for f in found if self.source_split in (None, f.split)]
        prefix = "{}/" if len({file.split for file in chosen}) > 1 else ""
        schema = hub_rows.read_schema(chosen[0].path)
        features = _features(schema)
        columns = self._columns(schema, features)
        files, sizes, first = list[FileRows](), list[list[int]](), Counter[str]()
        for path, split in ((file.path, file.split) for file in chosen):
            missing = set(columns.names) - set(hub_rows.read_schema(path).names)
            if missing:
                raise UserError(
                    f"{path} lacks the column {min(missing)}, which {chosen[0].path} has."
                )
            sizes.append(hub_rows.picture_sizes(root, path, columns.image))
            files.append(FileRows(path, 0, len(sizes[-1]), first[split], prefix.format(split)))
            first[split] += len(sizes[-1])
        if not sum(first.values()):
            raise UserError(f"{self.source} has no rows.")
        classes: Sequence[str] = features.get(columns.label or "", {}).get("names", ())
        if columns.label and hub_rows.is_text(schema.field(columns.label).type):
            classes = _texts(files, columns.label)
        return HubSamples(root, tuple(files), tuple(sizes), columns, tuple(classes), self)

    def _columns(self, schema: Any, features: Mapping[str, Any]) -> Columns:
        """Find out what the columns are; raises UserError naming all of them."""
        listed = f"Its columns: {', '.join(f'{field.name} ({field.type})' for field in schema)}."

        def of_type(name: str) -> list[str]:
            return [column for column, feature in features.items() if feature["_type"] == name]

        def check(option: str, name: str | None, fits: Callable[[Any], bool]) -> None:
            if name is not None and name not in schema.names:
                raise UserError(
                    f"--{option} {name}: {self.source} has no such column"
                    f"{did_you_mean(name, schema.names)} {listed}"
                )
            if name is not None and not fits(schema.field(name).type):
                raise UserError(f"--{option} {name}: the column is of another type. {listed}")

        pictures = [self.image] if self.image else of_type("Image")
        unknown = [field for field in schema if field.name not in features]
        pictures = pictures or [f.name for f in unknown if hub_rows.is_picture(f.type)]
        if len(pictures) != 1:
            raise UserError(
                f"{self.source} has {len(pictures)} columns of pictures by their types: name one "
                f"with --image. {listed}"
            )
        classes = of_type("ClassLabel")
        label = self.label or (classes[0] if len(classes) == 1 else None)
        check("image", pictures[0], hub_rows.may_be_picture)
        check("label", label, hub_rows.is_class)
        check("text", self.text, hub_rows.is_text)
        check("key", self.key, hub_rows.is_class)
        rest = [f for f in schema if f.name not in (pictures[0], label, self.text, self.key)]
        dropped = tuple(field.name for field in rest if hub_rows.holds_bytes(field.type))
        others = tuple(field.name for field in rest if field.name not in dropped)
        return Columns(pictures[0], label, self.text, self.key, others, dropped)


def _features(schema: Any) -> dict[str, Any]:
    """Return what `datasets` wrote about the columns, as far as it has one type each."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    features = (json.loads(text).get("info") or {}).get("features") or {}
    return {name: f for name, f in features.items() if isinstance(f, dict) and "_type" in f}


def _texts(files: Sequence[FileRows], column: str) -> list[str]:
    """Return the different texts of a column, sorted: the names of classes."""
    found: set[str] = set()
    for rows in files:
        found |= {row[column] for _, row in rows.read([column])} - {None}
    return sorted(found)
