"""Packing into a directory: parts are written below `_stage/` and then renamed.

Any number of starts, one after the other, ends with the same files.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from pipeline.data.pace import Progress
from pipeline.data.pack.files import (
    PLAN,
    STAGE,
    SUMMARY,
    check_same,
    closing_files,
    foreign_shards,
    shard_names,
)
from pipeline.data.pack.parts import part_paths, read_record, write_part
from pipeline.data.pack.sources import Source
from pipeline.data.pool import worker_processes
from pipeline.errors import UserError
from pipeline.files import create_exclusive, publish, write_atomic

Ranges = Sequence[tuple[int, int]]


def pack_locally(
    source: Source,
    out: Path,
    identity: dict[str, Any],
    ranges: Ranges,
    workers: int,
    progress: Progress | None,
) -> None:
    """Write the shards of the ranges, and what belongs to them, into `out`."""
    if not _is_complete(out, identity):
        stage = _open_stage(out, identity)
        _write_parts(source, ranges, stage, workers, progress)
        _publish(source, len(ranges), out, identity)
    shutil.rmtree(out / STAGE, ignore_errors=True)  # what is left of it holds nothing we need


def _is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Tell whether `out` holds this very pack; raise UserError if it holds another."""
    summary = out / SUMMARY
    if not summary.exists():
        return False
    check_same(out, json.loads(summary.read_bytes())["identity"], identity)
    return True


def _open_stage(out: Path, identity: dict[str, Any]) -> Path:
    """Create the stage with its plan, or go on with the one of a pack that was stopped."""
    stage = out / STAGE
    plan = out / PLAN
    if not plan.exists():
        foreign = sorted(out.glob("*.tar"))
        if foreign:
            raise foreign_shards(out, foreign[0].name)
        try:
            stage.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{stage} cannot be created: {error.strerror}.") from error
        create_exclusive(plan, json.dumps(identity, sort_keys=True).encode())
    check_same(out, json.loads(plan.read_bytes()), identity)
    return stage


def _write_parts(
    source: Source, ranges: Ranges, stage: Path, workers: int, progress: Progress | None
) -> None:
    """Write the parts that have no record yet."""
    missing = [
        (number, lo, hi)
        for number, (lo, hi) in enumerate(ranges)
        if not part_paths(stage, number)[1].exists()
    ]
    for count, _ in enumerate(_written(source, missing, stage, workers), start=1):
        if progress:
            progress(f"pack: {len(ranges) - len(missing) + count} of {len(ranges)} shards")


def _written(
    source: Source, missing: Sequence[tuple[int, int, int]], stage: Path, workers: int
) -> Iterator[int]:
    """Write parts and yield their numbers as they are finished."""
    if workers == 1 or len(missing) < 2:
        for number, lo, hi in missing:
            yield write_part(source.part(lo, hi), stage, number)
        return
    with worker_processes(min(workers, len(missing))) as pool:
        futures = [
            pool.submit(write_part, source.part(lo, hi), stage, number)
            for number, lo, hi in missing
        ]
        for future in as_completed(futures):
            yield future.result()


def _publish(source: Source, num_parts: int, out: Path, identity: dict[str, Any]) -> None:
    """Move the parts to their final names and write the closing files; redo is harmless."""
    stage = out / STAGE
    records = [read_record(stage, number) for number in range(num_parts)]
    for number, name in shard_names(records).items():
        staged, _ = part_paths(stage, number)
        if staged.exists():
            publish(staged, out / name)
    for name, content in closing_files(source, records, identity).items():
        write_atomic(out / name, content)
