"""The shards of a pack: written in parts, and published in a directory or a store behind a URL.

directory   parts are written below `_stage/` -> renamed
URL         a part is written into a temporary directory -> uploaded under its final name
            -> upload of its record `_stage/part-000012.json`: the part is done

A stopped pack continues after the existing records: any number of starts in a row ends with the
same files, whose bytes are the same in a directory and behind a URL.
"""

import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import create_exclusive, publish, write_atomic
from pipeline.data.pack.files import (
    PLAN,
    STAGE,
    SUMMARY,
    check_same,
    closing_files,
    foreign_shards,
    shard_name,
    shard_names,
)
from pipeline.data.pack.parts import PartRecord, part_paths, read_record, write_part
from pipeline.data.pack.sources import Samples
from pipeline.data.pool import worker_processes
from pipeline.data.progress import Progress, ProgressTracker
from pipeline.data.storage import is_url, open_storage
from pipeline.data.storage.opening import open_writable
from pipeline.data.storage.patterns import find_shards
from pipeline.data.storage.writable import WritableStore

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class FoundPack:
    """What an earlier start left: the identity of its plan, None if there is no plan."""

    identity: Any
    is_complete: bool


def find_pack(out: Path | str) -> FoundPack:
    """Look for a pack in a directory or below a URL; raises UserError for a read-only store."""
    if is_url(out):
        open_writable(str(out))
        found = _read_all(str(out), [SUMMARY, PLAN])
    else:
        paths = {name: Path(out) / name for name in (SUMMARY, PLAN)}
        found = {name: path.read_bytes() for name, path in paths.items() if path.exists()}
    if SUMMARY in found:
        return FoundPack(json.loads(found[SUMMARY])["identity"], is_complete=True)
    return FoundPack(json.loads(found.get(PLAN, b"null")), is_complete=False)


def pack_locally(
    samples: Samples,
    out: Path,
    identity: dict[str, Any],
    ranges: Ranges,
    workers: int,
    progress: Progress | None,
) -> None:
    """Write the shards of the ranges, and what belongs to them, into `out`."""
    stage = _open_stage(out, identity)
    missing = [n for n in range(len(ranges)) if not part_paths(stage, n)[1].exists()]
    written = _written(samples, ranges, missing, stage, workers, ahead=len(missing))
    for _ in _tracked(written, samples, ranges, missing, progress):
        pass
    _publish(samples, len(ranges), out, identity)


def _open_stage(out: Path, identity: dict[str, Any]) -> Path:
    """Create the stage with its plan, or reuse the stage of a stopped pack."""
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


def _publish(samples: Samples, num_parts: int, out: Path, identity: dict[str, Any]) -> None:
    """Move the parts to their final names and write the closing files; may be repeated."""
    stage = out / STAGE
    records = [read_record(stage, number) for number in range(num_parts)]
    for number, name in shard_names(records).items():
        staged, _ = part_paths(stage, number)
        if staged.exists():
            publish(staged, out / name)
    for name, content in closing_files(samples, records, identity).items():
        write_atomic(out / name, content)


def pack_remotely(
    samples: Samples,
    out: str,
    identity: dict[str, Any],
    ranges: Ranges,
    workers: int,
    progress: Progress | None,
) -> None:
    """Write the shards of the ranges, and what belongs to them, below the URL `out`."""
    store = open_writable(out)
    names = [_record_name(number) for number in range(len(ranges))]
    found = _read_all(out, [PLAN, *names])
    _open_plan(store, out, found.get(PLAN), identity)
    records = [PartRecord(**json.loads(found[name])) for name in names if name in found]
    # Records are uploaded in sequence, so the existing ones are the first.
    rest = range(len(records), len(ranges))
    with TemporaryDirectory(prefix="latentmill-pack-") as folder:
        written = _written(samples, ranges, rest, Path(folder), workers, ahead=workers)
        for number in _tracked(written, samples, ranges, rest, progress):
            _upload(store, Path(folder), number, records)
    for name, content in closing_files(samples, records, identity).items():
        store.put(name, content)


def clear_stage(out: Path | str, num_parts: int) -> None:
    """Remove what a complete pack no longer needs."""
    if not is_url(out):
        shutil.rmtree(Path(out) / STAGE, ignore_errors=True)
        return
    store = open_writable(str(out))
    for name in (*map(_record_name, range(num_parts)), PLAN):
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
    except UserError:  # no shards, as expected
        foreign = ()
    if foreign:
        raise foreign_shards(out, foreign[0])
    store.put(PLAN, json.dumps(identity, sort_keys=True).encode())


def _upload(store: WritableStore, stage: Path, number: int, records: list[PartRecord]) -> None:
    """Publish a part and then its record, append the record, and remove the file."""
    record, file = read_record(stage, number), part_paths(stage, number)[0]
    if record.num_samples:
        store.put(shard_name(sum(bool(r.num_samples) for r in records)), file)
    store.put(_record_name(number), json.dumps(asdict(record)).encode())
    file.unlink()
    records.append(record)


def _tracked(
    written: Iterator[int],
    samples: Samples,
    ranges: Ranges,
    numbers: Sequence[int],
    progress: Progress | None,
) -> Iterator[int]:
    """Pass on the numbers of parts that are written now; report how much of all is done."""
    sizes = samples.sizes()
    part_bytes = [sum(sizes[lo:hi]) for lo, hi in ranges]
    tracker = ProgressTracker("pack", len(ranges), sum(part_bytes), progress)
    for number in sorted(set(range(len(ranges))) - set(numbers)):
        tracker.add(part_bytes[number], is_read=False)
    for number in written:
        yield number
        tracker.add(part_bytes[number])


def _written(
    samples: Samples,
    ranges: Ranges,
    numbers: Sequence[int],
    stage: Path,
    workers: int,
    *,
    ahead: int,
) -> Iterator[int]:
    """Write parts into the stage and yield their numbers in sequence, each when it is complete.

    At most `ahead` parts are written before they are yielded.
    """
    workers = min(workers, len(numbers))
    waiting: deque[Future[int]] = deque()
    with nullcontext() if workers < 2 else worker_processes(workers) as pool:
        for number in numbers:
            part = samples.part(*ranges[number])
            if pool is None:
                yield write_part(part, stage, number)
                continue
            waiting.append(pool.submit(write_part, part, stage, number))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
