"""Finished exports of made-up latents: by the real writers, commit records and finalize."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.common.files import sha256_file
from pipeline.data.storage.opening import open_writable
from pipeline.export.adopt import store_plan
from pipeline.export.commit import Commit, FileRecord, commit
from pipeline.export.finalize import finalize
from pipeline.export.layout import ExportDir, data_path
from pipeline.export.plan import ExportPlan, Task
from pipeline.export.statistics import partial_of, to_json
from pipeline.latents.formats.writers import NO_LABEL, Rows, Writer

MODEL = "ab" * 32


def make_rows(
    shard: int,
    num_rows: int,
    shape: tuple[int, ...] = (3,),
    *,
    dtype: str = "float32",
    fields: Sequence[str] = ("mu", "logvar"),
    notes: bool = True,
    key: str = "{shard:04d}/{row:05d}",
) -> Rows:
    """Rows of one shard; of every seven one could not be encoded, where there are `notes`."""
    generator = np.random.default_rng(shard)
    channels = np.arange(shape[0], dtype=np.float32).reshape(-1, *(1 for _ in shape[1:]))
    is_bfloat16 = dtype == "bfloat16"
    latents = {}
    for number, field in enumerate(fields):
        values = generator.normal(size=(num_rows, *shape)) * 0.5 + channels - number
        latents[field] = values.astype("float32" if is_bfloat16 else dtype)
        if is_bfloat16:
            bits = latents[field].view(np.uint32)
            bits &= np.uint32(0xFFFF0000)
    valid = np.ones(num_rows, np.bool_)
    if notes:
        valid[3::7] = False
        for values in latents.values():
            values[~valid] = 0
    labels = np.where(np.arange(num_rows) % 5 == 2, NO_LABEL, np.arange(num_rows) % 4)
    texts = [None if row % 6 == 1 else f'{{"x": {row}, "é": "ü"}}' for row in range(num_rows)]
    return Rows(
        f"shard-{shard:06d}",
        [key.format(shard=shard, row=row) for row in range(num_rows)],
        np.arange(num_rows),
        valid,
        labels if notes else np.full(num_rows, NO_LABEL),
        texts if notes else [None] * num_rows,
        [f"ä {row}" if notes and row % 4 else None for row in range(num_rows)],
        latents,
        **({"bfloat16": True} if is_bfloat16 else {}),
    )


def _write_files(root: Path, rows: Rows, kind: str) -> list[FileRecord]:
    """Write a shard in one format, which may take several files, the first one first."""
    writer = TypeAdapter(Writer).validate_python({"kind": kind})
    path = root / data_path(kind, rows.shard, writer.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write(path, rows)
    others = sorted(set(path.parent.glob(f"{rows.shard}.*")) - {path})
    return [
        FileRecord(p.relative_to(root).as_posix(), p.stat().st_size, sha256_file(p))
        for p in (path, *others)
    ]


def write_export(
    out: Path, shards: Sequence[Rows], kinds: Sequence[str], *, dtype: str = "float32"
) -> Path:
    """Leave a finished export in `out`."""
    export = ExportDir(open_writable(out))
    fingerprint: dict[str, Any] = {
        "model": {"weights_sha256": MODEL},
        "output": {
            "fields": list(shards[0].latents),
            "latent_shape": list(shards[0].latent_shape),
            "dtype": dtype,
            "columns": {name: column.kind for name, column in shards[0].columns.items()},
            "formats": [{"kind": kind} for kind in kinds],
        },
    }
    tasks = tuple(
        Task(rows.shard, number, len(rows), f"{rows.shard}.tar", "")
        for number, rows in enumerate(shards)
    )
    plan = ExportPlan(fingerprint, tasks)
    store_plan(export, plan)
    for rows in shards:
        record = Commit(
            task=rows.shard,
            attempt="none",
            keys=list(rows.keys),
            faults=[
                [int(row), rows.keys[row], "decode", "broken"] for row in rows.rows[~rows.valid]
            ],
            files=[file for kind in kinds for file in _write_files(out, rows, kind)],
            statistics=to_json(partial_of(rows.latents, rows.valid)),
            process={},
        )
        assert commit(export, record)
    finalize(export, plan)
    return out
