"""`latentmill probe EXPORT`: probes of exported latents, compared with the raw pixels.

EXPORT/manifest.json -> rows (mu, label, metadata) -> targets -> evaluation.linear_probe
the source's shards  -> stored values of the same rows, flattened -> evaluation.linear_probe
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.common.errors import UserError
from pipeline.common.labels import NO_LABEL
from pipeline.data.decode import Decode
from pipeline.data.index import Index
from pipeline.data.sequential import read_shards
from pipeline.data.settings import DataConfig
from pipeline.evaluation.linear_probe import Score, probe_features
from pipeline.latents.fields import parse_texts
from pipeline.latents.files import LocalFiles
from pipeline.latents.formats.writers import BaseWriter, Rows, Writer
from pipeline.latents.manifest import read_manifest

LABEL = "label"
BATCH_ROWS = 256


def probe_export(
    root: Path,
    *,
    source: Path | str | None = None,
    targets: Sequence[str] | None = None,
    max_samples: int = 8000,
) -> list[Score]:
    """Probe a finished export and, if `source` names its data set, the raw pixels of the same rows.

    targets: `label` or fields of the samples' JSON; None: all that every sample has. max_samples:
    of more rows, evenly spaced ones are taken. Raises UserError if the export is not finished, the
    source is another data set, or a target is missing.
    """
    manifest = read_manifest(LocalFiles(root), None).values
    stride = max(1, -(-manifest["rows"] // max_samples))
    chosen = [_every_nth(rows, stride) for rows in _read_rows(root, manifest)]
    latents = np.concatenate([rows.latents[rows.main].reshape(len(rows), -1) for rows in chosen])
    keys = [key for rows in chosen for key in rows.keys]
    values = _targets(chosen, targets)
    scores = probe_features(latents.astype(np.float32), keys, values, name="latents")
    if source is not None:
        pixels = _pixels(source, manifest, chosen)
        scores += probe_features(pixels, keys, values, name="pixels")
    return scores


def _read_rows(root: Path, manifest: Mapping[str, Any]) -> Iterator[Rows]:
    """Yield every task's rows from the first of the export's formats."""
    formats = manifest["fingerprint"]["output"]["formats"]
    writer: BaseWriter = TypeAdapter[Writer](Writer).validate_python(formats[0])
    for task in manifest["tasks"]:
        path = root / task["files"][0]["path"]
        try:
            yield writer.read(path)
        except ValueError as error:
            raise UserError(
                f"{path} is damaged: {error}. `latentmill verify {root}` says what else is."
            ) from error


def _every_nth(rows: Rows, stride: int) -> Rows:
    """Return every stride-th of the valid rows."""
    chosen: NDArray[np.int64] = np.flatnonzero(rows.valid)[::stride]
    return replace(
        rows,
        keys=[str(rows.keys[i]) for i in chosen.tolist()],
        rows=rows.rows[chosen],
        valid=rows.valid[chosen],
        labels=rows.labels[chosen],
        metadata=[rows.metadata[i] for i in chosen.tolist()],
        texts=[rows.texts[i] for i in chosen.tolist()],
        columns={},
        label_texts={},
        latents={field: values[chosen] for field, values in rows.latents.items()},
    )


def _targets(chosen: Sequence[Rows], names: Sequence[str] | None) -> dict[str, NDArray[Any]]:
    labels = np.concatenate([rows.labels for rows in chosen])
    parsed = [value for rows in chosen for value in parse_texts(rows.metadata)]
    fields: list[dict[str, Any]] = [it if isinstance(it, dict) else {} for it in parsed]
    found: dict[str, NDArray[Any]] = {}
    if labels.size and (labels != NO_LABEL).all():
        found[LABEL] = labels
    for name in dict.fromkeys(name for field in fields for name in field):
        values = [field.get(name) for field in fields]
        if all(isinstance(it, str | int | float) and it == it for it in values):  # no NaN
            found[name] = np.array(values)
    if names is None:
        # Leave out paths and serial numbers, which differ in every sample.
        names = [n for n, v in found.items() if v.dtype.kind == "f" or len(set(v)) < len(v) // 4]
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise UserError(
            f"no target {', '.join(missing) or 'at all'} that every sample has; there are: "
            f"{', '.join(found) or 'none'}. Targets are `label` (a .cls member), which "
            f"{np.count_nonzero(labels != NO_LABEL):,} of {labels.size:,} samples have, or fields "
            "of the samples' .json."
        )
    return {name: found[name] for name in names}


def _pixels(
    source: Path | str, manifest: Mapping[str, Any], chosen: Sequence[Rows]
) -> NDArray[np.floating[Any]]:
    """Return the stored values of the chosen rows, [N, D] in [0, 1]."""
    recorded = manifest["fingerprint"]["data"]
    index = Index.open(source)
    if index.dataset_id != recorded["dataset_id"]:
        raise UserError(
            f"{source} holds the data set {index.dataset_id}, but the export was made from "
            f"{recorded['dataset_id']}: name the place of that one by --source."
        )
    decode = TypeAdapter[Decode](Decode).validate_python(recorded["decode"])
    split = recorded["split"].partition("/")[0]
    data = DataConfig(path=str(source), split=split, decode=decode)
    index.check_shards(source)
    numbers = {shard.name.removesuffix(".tar"): n for n, shard in enumerate(index.shards)}
    parts: list[NDArray[np.floating[Any]]] = []
    wanted = [numbers[rows.shard] for rows in chosen]
    with closing(read_shards(data, index, wanted, BATCH_ROWS)) as shards:
        for rows, (_, batches) in zip(chosen, shards, strict=True):
            kept = set(rows.rows.tolist())
            for batch in batches:
                keep = [i for i, row in enumerate(batch.rows.tolist()) if row in kept]
                parts.append(decode.to_unit(batch.x[: batch.num_rows]).flatten(1).numpy()[keep])
    return np.concatenate(parts)
