"""One task: the rows of a shard -> their latents, as they are stored.

RowBatch (stored values) -> device -> [0, 1] -> each view -> encoder -> mu, logvar (-> z)
-> stored dtype -> Rows

All batches have the same full shape; the last one is padded with zeros. The choice of kernels and
their summation order can depend on the batch size, and must not change a bit between two runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.precision import autocast
from pipeline.data.sequential import RowBatch
from pipeline.data.settings import MIN_SAMPLES_JUDGED
from pipeline.export.commit import Fault
from pipeline.export.failures import RejectedError
from pipeline.export.passthrough import JsonFields
from pipeline.export.statistics import NOT_FINITE
from pipeline.latents.formats.writers import Dtype, Rows
from pipeline.latents.noise import sample
from pipeline.latents.rows import field_of


@dataclass(frozen=True)
class Noise:
    """What the noise of sampled latents depends on, besides the element."""

    seed: int
    first_row: Mapping[str, int]  # of each task: row number in the export


@dataclass(frozen=True)
class Encoding:
    """The function from stored values [B, *event] to the stored latents of each view."""

    encode: Callable[[Tensor], Mapping[str, Tensor]]  # see `OpenEncoder`
    to_unit: Callable[[Tensor], Tensor]
    device: torch.device
    precision: Literal["fp32", "bf16"]
    stored: tuple[str, ...]  # of mu, logvar, z
    dtype: Dtype  # stored
    views: tuple[str, ...] = ("identity",)
    noise: Noise | None = None  # of z
    json_fields: JsonFields = field(default_factory=JsonFields)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all stored arrays, view by view."""
        return tuple(field_of(name, view) for view in self.views for name in self.stored)

    def start(self, stored: Tensor) -> list[Mapping[str, Tensor]]:
        """Encode each view of a batch; on a GPU, without waiting for the result."""
        with torch.inference_mode(), autocast(self.precision, self.device):
            x = self.to_unit(stored.to(self.device, non_blocking=True))
            return [self.encode(x.flip(-1) if view == "hflip" else x) for view in self.views]

    def finish(
        self, outputs: Sequence[Mapping[str, Tensor]], rows: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Wait for the outputs of `start`; return field -> [B, *latent] in the stored dtype.

        rows: [B] row numbers in the export. Values beyond the dtype's range become inf; bfloat16
        values are returned as float32.
        """
        return {
            field_of(name, view): self._store(self._values(output, name, rows, view))
            for view, output in zip(self.views, outputs, strict=True)
            for name in self.stored
        }

    def _values(
        self, output: Mapping[str, Tensor], name: str, rows: NDArray[np.int64], view: str
    ) -> NDArray[np.float32]:
        if name in output:
            return _to_numpy(output[name])
        assert self.noise is not None, "z needs noise"
        mu, logvar = _to_numpy(output["mu"]), _to_numpy(output["logvar"])
        return sample(mu, logvar, rows, seed=self.noise.seed, view=view)

    def _store(self, values: NDArray[np.float32]) -> NDArray[Any]:
        if self.dtype == "bfloat16":
            return torch.from_numpy(values).bfloat16().float().numpy()
        with np.errstate(over="ignore"):
            return values.astype(self.dtype)


def _to_numpy(values: Tensor) -> NDArray[np.float32]:
    return values.detach().float().cpu().numpy()


def encode_task(
    shard: str,
    batches: Iterable[RowBatch],
    encoder: Encoding,
    *,
    max_bad_fraction: float,
    on_rows: Callable[[int], None],
) -> tuple[Rows, list[Fault]]:
    """Encode one shard; a row that cannot be decoded or encoded is kept as zeros and listed.

    Raises RejectedError if all rows fail, or more than `max_bad_fraction` of them, counted as at
    least MIN_SAMPLES_JUDGED; UserError if a sample lacks a JSON field that the settings name.
    """
    parts: list[Rows] = []
    faults: list[Fault] = []
    next_row = 0 if encoder.noise is None else encoder.noise.first_row[shard]
    for batch, outputs in _one_ahead(encoder, batches):
        latents = encoder.finish(outputs, next_row + np.arange(len(batch.x)))
        rows, found = _rows_of(shard, batch, latents, encoder)
        parts.append(rows)
        faults.extend(found)
        next_row += batch.num_rows
        on_rows(batch.num_rows)
    rows = _concatenate(parts)
    num_rows, num_bad = len(rows), len(rows) - int(rows.valid.sum())
    # Of few rows one bad one is a large part: `finalize` judges all rows of the export together.
    allowed = max_bad_fraction * max(num_rows, MIN_SAMPLES_JUDGED)
    if num_bad > allowed or (num_bad == num_rows and max_bad_fraction < 1):
        raise RejectedError(
            f"{num_bad} of the {num_rows} rows of {shard} failed, more than max_bad_fraction = "
            f"{max_bad_fraction} allows. The first: {faults[0]}."
        )
    return encoder.json_fields.apply(rows), faults


def _one_ahead(
    encoder: Encoding, batches: Iterable[RowBatch]
) -> Iterator[tuple[RowBatch, list[Mapping[str, Tensor]]]]:
    """Start each batch before the result of the previous one is fetched: a GPU never idles."""
    waiting: tuple[RowBatch, list[Mapping[str, Tensor]]] | None = None
    for batch in batches:
        started = (batch, encoder.start(batch.x))
        if waiting is not None:
            yield waiting
        waiting = started
    if waiting is not None:
        yield waiting


def _rows_of(
    shard: str, batch: RowBatch, padded: Mapping[str, NDArray[Any]], encoder: Encoding
) -> tuple[Rows, list[Fault]]:
    """Return a batch's rows without the padding, and its faults."""
    count = batch.num_rows
    latents = {name: values[:count] for name, values in padded.items()}
    valid = batch.valid.copy()
    faults: list[Fault] = [
        (fault.row, fault.key, fault.stage, fault.reason) for fault in batch.faults
    ]
    finite = np.ones(count, np.bool_)
    for values in latents.values():
        finite &= np.isfinite(values).reshape(count, -1).all(axis=1)
    for i in np.flatnonzero(valid & ~finite):
        reason = f"not a finite {encoder.dtype} number"
        faults.append((int(batch.rows[i]), batch.keys[i], NOT_FINITE, reason))
    valid &= finite
    for values in latents.values():
        values[~valid] = 0
    rows = Rows(
        shard=shard,
        keys=batch.keys,
        rows=batch.rows,
        valid=valid,
        labels=batch.labels,
        # Some formats cannot distinguish an empty text, or JSON's null, from a missing one.
        metadata=[None if text in ("", "null") else text for text in batch.metadata],
        texts=[text or None for text in batch.texts],
        latents=latents,
        bfloat16=encoder.dtype == "bfloat16",
        label_texts=batch.label_texts,
    )
    return rows, sorted(faults)


def _concatenate(parts: list[Rows]) -> Rows:
    return Rows(
        shard=parts[0].shard,
        keys=[key for part in parts for key in part.keys],
        rows=np.concatenate([part.rows for part in parts]),
        valid=np.concatenate([part.valid for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        metadata=[text for part in parts for text in part.metadata],
        texts=[text for part in parts for text in part.texts],
        latents={
            name: np.concatenate([part.latents[name] for part in parts])
            for name in parts[0].latents
        },
        bfloat16=parts[0].bfloat16,
        label_texts={
            first + i: text
            for first, part in zip(accumulate(map(len, parts), initial=0), parts, strict=False)
            for i, text in part.label_texts.items()
        },
    )
