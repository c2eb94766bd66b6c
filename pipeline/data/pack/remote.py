"""Packing into a store behind a URL: each part is written locally, uploaded, and removed.

    source -> write_part into a temporary directory -> upload under its final name
           -> upload of its record `_stage/part-000012.json`: the part is done

A pack that was stopped goes on after the records that are there. The shards and the files beside
them have the same bytes as those of a local pack.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.data.pace import Progress
from pipeline.data.pack.files import (
    PLAN,
    STAGE,
    SUMMARY,
    check_same,
    closing_files,
    foreign_shards,
    shard_name,
)
from pipeline.data.pack.parts import PartRecord, part_paths, read_record, write_part
from pipeline.data.pack.sources import Source
from pipeline.data.pool import worker_processes
from pipeline.data.storage import open_storage
from pipeline.data.storage.opening import open_writable
from pipeline.data.storage.patterns import find_shards
from pipeline.data.storage.writable import WritableStore
from pipeline.errors import UserError

Ranges = Sequence[tuple[int, int]]


def pack_remotely(
    source: Source,
    out: str,
    identity: dict[str, Any],
    ranges: Ranges,
    workers: int,
    progress: Progress | None,
) -> None:
    """Write the shards of the ranges, and what belongs to them, below the URL `out`."""
    store = open_writable(out)
    names = [_record_name(number) for number in range(len(ranges))]
    found = _read_all(out, [SUMMARY, PLAN, *names])
    if SUMMARY in found:
        check_same(out, json.loads(found[SUMMARY])["identity"], identity)
    else:
        _open_plan(store, out, found.get(PLAN), identity)
        records = [PartRecord(**json.loads(found[name])) for name in names if name in found]
        # They were uploaded in order; so what is there is the beginning.
        with TemporaryDirectory(prefix="latentmill-pack-") as folder:
            rest = _written(source, ranges, len(records), Path(folder), workers)
            for record, file in rest:
                _upload(store, record, file, records)
                if progress:
                    progress(f"pack: {len(records)} of {len(ranges)} shards")
        for name, content in closing_files(source, records, identity).items():
            store.put(name, content)
    for name in (*names, PLAN):
        store.delete(name)


def _record_name(number: int) -> str:
    return f"{STAGE}/{part_paths(Path(), number)[1].name}"


def _read_all(root: str, names: Sequence[str]) -> dict[str, bytes]:
    """Contents of those of the named small files that exist."""
    with closing(open_storage(root)) as storage:
        states = storage.states(names)
        return {
            name: storage.read(name, 0, state.num_bytes)
            for name, state in states.items()
            if state is not None
        }


def _open_plan(
    store: WritableStore, out: str, plan: bytes | None, identity: dict[str, Any]
) -> None:
    if plan is not None:
        check_same(out, json.loads(plan), identity)
        return
    try:
        foreign = find_shards(out).names
    except UserError:  # none are there, as it should be
        foreign = ()
    if foreign:
        raise foreign_shards(out, foreign[0])
    store.put(PLAN, json.dumps(identity, sort_keys=True).encode())


def _written(
    source: Source, ranges: Ranges, first: int, stage: Path, workers: int
) -> Iterator[tuple[PartRecord, Path]]:
    """Write the parts from `first` on and yield them in order; the caller removes the files.

    At most `workers` parts lie in the stage, or are being written, at a time.
    """
    numbers = range(first, len(ranges))
    workers = min(workers, len(numbers))
    waiting: deque[tuple[int, Future[int]]] = deque()
    with nullcontext() if workers < 2 else worker_processes(workers) as pool:
        for number in numbers:
            part = source.part(*ranges[number])
            if pool is None:
                write_part(part, stage, number)
                yield read_record(stage, number), part_paths(stage, number)[0]
                continue
            waiting.append((number, pool.submit(write_part, part, stage, number)))
            if len(waiting) == workers:
                yield _next(waiting, stage)
        while waiting:
            yield _next(waiting, stage)


def _next(waiting: deque[tuple[int, Future[int]]], stage: Path) -> tuple[PartRecord, Path]:
    number, future = waiting.popleft()
    future.result()
    return read_record(stage, number), part_paths(stage, number)[0]


def _upload(
    store: WritableStore, record: PartRecord, file: Path, records: list[PartRecord]
) -> None:
    """Publish a part and then its record, and append that to those before it."""
    if record.num_samples:
        store.put(shard_name(sum(bool(r.num_samples) for r in records)), file)
    store.put(_record_name(len(records)), json.dumps(asdict(record)).encode())
    file.unlink()
    records.append(record)
