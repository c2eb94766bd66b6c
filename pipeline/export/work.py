"""One task: the rows of a shard -> their latents, as they will be stored.

RowBatch (stored values) -> device -> [0, 1] -> encoder -> mu, logvar -> stored dtype -> Rows

Batches have the same full shape always, the last one padded with zeros: kernels whose choice or
summation order depends on the batch size then cannot change a bit between two runs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.reasons import stable_reason
from pipeline.data.rows import RowBatch
from pipeline.errors import UserError
from pipeline.models.bottleneck import Posterior
from pipeline.precision import autocast
from pipeline.writers import Dtype, Rows

Fault = tuple[int, str, str, str]  # row in the source shard, key, stage, reason


@dataclass(frozen=True)
class Encoder:
    """From stored values [B, *event] to the posterior's parameters."""

    encode: Callable[[Tensor], Posterior]  # x [B, *event] in [0, 1]
    to_unit: Callable[[Tensor], Tensor]
    device: torch.device
    precision: Literal["fp32", "bf16"]
    fields: tuple[str, ...]  # of the posterior, to be stored
    dtype: Dtype  # stored

    def __call__(self, stored: Tensor) -> dict[str, NDArray[Any]]:
        """Return field -> [B, *latent] in the stored dtype; what does not fit becomes inf.

        Numbers of bfloat16 come as float32.
        """
        with torch.inference_mode(), autocast(self.precision, self.device):
            x = self.to_unit(stored.to(self.device, non_blocking=True))
            posterior = self.encode(x)
        found = {"mu": posterior.mu, "logvar": posterior.logvar}
        return {field: self._store(found[field]) for field in self.fields}

    def _store(self, values: Tensor | None) -> NDArray[Any]:
        assert values is not None, "`fields` names only what the posterior has"
        values = values.detach().float()
        if self.dtype == "bfloat16":
            return values.bfloat16().float().cpu().numpy()
        with np.errstate(over="ignore"):
            return values.cpu().numpy().astype(self.dtype)


def encode_task(
    shard: str,
    batches: Iterable[RowBatch],
    encoder: Encoder,
    *,
    max_bad_fraction: float,
    on_rows: Callable[[int], None],
) -> tuple[Rows, list[Fault]]:
    """Encode one shard; a row that cannot be decoded or encoded is kept as zeros and listed.

    Raises UserError when more than `max_bad_fraction` of the rows fail.
    """
    parts: list[Rows] = []
    faults: list[Fault] = []
    for batch in batches:
        rows, found = _encode_batch(shard, batch, encoder)
        parts.append(rows)
        faults.extend(found)
        on_rows(batch.num_rows)
    rows = _concatenate(parts)
    num_bad = len(rows) - int(rows.valid.sum())
    if num_bad > max_bad_fraction * len(rows):
        raise UserError(
            f"{num_bad} of the {len(rows)} rows of {shard} failed, more than max_bad_fraction = "
            f"{max_bad_fraction} allows. The first: {faults[0]}."
        )
    return rows, faults


def _encode_batch(shard: str, batch: RowBatch, encoder: Encoder) -> tuple[Rows, list[Fault]]:
    count = batch.num_rows
    latents = {field: values[:count] for field, values in encoder(batch.x).items()}
    valid = batch.valid.copy()
    faults: list[Fault] = [
        (fault.row, fault.key, fault.stage, stable_reason(fault.reason)) for fault in batch.faults
    ]
    finite = np.ones(count, np.bool_)
    for values in latents.values():
        finite &= np.isfinite(values).reshape(count, -1).all(axis=1)
    for place in np.flatnonzero(valid & ~finite):
        reason = f"not a finite {encoder.dtype} number"
        faults.append((int(batch.rows[place]), batch.keys[place], "latent", reason))
    valid &= finite
    for values in latents.values():
        values[~valid] = 0
    rows = Rows(
        shard=shard,
        keys=batch.keys,
        rows=batch.rows,
        valid=valid,
        labels=batch.labels,
        metadata=batch.metadata,
        latents=latents,
        bfloat16=encoder.dtype == "bfloat16",
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
        latents={
            field: np.concatenate([part.latents[field] for part in parts])
            for field in parts[0].latents
        },
        bfloat16=parts[0].bfloat16,
    )
