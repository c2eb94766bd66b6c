"""webdataset tar: `<key>.mu.npy`, `.logvar.npy`, `.cls`, `.json`, `.txt`, `.row.json`.

Or `.z.npy`, and `.mu_hflip.npy` ... of mirrored images. `wds.WebDataset(...).decode()` and the
webdataset loader of Hugging Face `datasets` decode all of them by their last suffix. `.cls`,
`.json` and `.txt` are label, metadata and text of the source, with its very bytes where these are
no integer, no JSON or no UTF-8. Every sample of a file has the same members, as `datasets`
requires, so a missing value is -1, null or empty. `.row.json` holds {"row": number in the source
shard, "valid": false if the latents are only zeros instead of a sample that could not be read} and,
where the source's label is -1 itself, "label": -1.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.labels import NO_LABEL, label_of
from pipeline.common.tars import open_tar
from pipeline.common.texts import from_bytes, to_bytes
from pipeline.latents.formats.tar.reader import NO_CLASS
from pipeline.latents.formats.writing import FIELDS, BaseWriter, Rows


class TarWriter(BaseWriter):
    """A tar like the source shard: same stem, same keys, same order."""

    kind: Literal["tar"] = "tar"

    @property
    def suffix(self) -> str:
        return ".tar"

    def write(self, path: Path, rows: Rows) -> None:
        """Create the tar; labels, metadata and texts get a member if any row has one."""
        has_labels = bool((rows.labels != NO_LABEL).any() or rows.label_texts)
        has_metadata, has_text = (
            any(text is not None for text in texts) for texts in (rows.metadata, rows.texts)
        )
        with open_tar(path) as write:
            for i, key in enumerate(rows.keys):
                members = {
                    f"{field}.npy": _npy(values[i]) for field, values in rows.latents.items()
                }
                if has_labels:
                    members["cls"] = to_bytes(rows.label_texts.get(i, str(rows.labels[i])))
                if has_metadata:
                    members["json"] = to_bytes(rows.metadata[i] or "null")
                if has_text:
                    members["txt"] = to_bytes(rows.texts[i] or "")
                row = {"row": int(rows.rows[i]), "valid": bool(rows.valid[i])}
                if i in rows.label_texts and label_of(members["cls"]) is not None:
                    row["label"] = NO_LABEL
                members["row.json"] = json.dumps(row).encode()
                write(key, members)

    def read(self, path: Path) -> Rows:
        try:
            samples = list(_samples(path))
            if not samples:
                raise ValueError("it holds no sample")
            rows = [json.loads(members["row.json"]) for _, members in samples]
            latents = {
                field: np.stack([_array(members[f"{field}.npy"]) for _, members in samples])
                for field in FIELDS
                if f"{field}.npy" in samples[0][1]
            }
            labels = [label_of(members.get("cls", NO_CLASS)) for _, members in samples]
            return Rows(
                shard=path.stem,
                keys=[key for key, _ in samples],
                rows=np.array([row["row"] for row in rows], np.int64),
                valid=np.array([row["valid"] for row in rows], np.bool_),
                labels=np.array([NO_LABEL if label is None else label for label in labels]),
                metadata=[_metadata(members) for _, members in samples],
                texts=[from_bytes(members.get("txt", b"")) or None for _, members in samples],
                latents=latents,
                label_texts={
                    i: from_bytes(samples[i][1]["cls"])
                    for i, label in enumerate(labels)
                    if label is None or "label" in rows[i]
                },
            )
        except (tarfile.TarError, KeyError, EOFError, OSError) as error:
            raise ValueError(f"{path.name} cannot be read: {error!r}") from error


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _array(data: bytes) -> NDArray[Any]:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _metadata(members: Mapping[str, bytes]) -> str | None:
    text = from_bytes(members.get("json", b"null"))
    return None if text == "null" else text


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield each sample's key and members by suffix, split at the base name's first dot."""
    key, members = "", dict[str, bytes]()
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            # Neighbours may have equal keys, if the samples between them belong to another split.
            if members and (folder + slash + stem != key or suffix in members):
                yield key, members
                members = {}
            key = folder + slash + stem
            content = tar.extractfile(member)
            if content is None:
                raise tarfile.TarError(f"{member.name} is no plain file")
            members[suffix] = content.read()
    if members:
        yield key, members
