"""pack: a source of samples -> webdataset shards and their index, in one directory.

source -> plan (which sample goes to which shard) -> parts, written by worker processes into
`_stage/` -> published as `shard-000000.tar` ... -> sidecars (`classes.json`, `broken.jsonl`) ->
`pack.json`, last -> index. The same source and settings give the same bytes for any number of
workers; a pack that was killed goes on where it stopped when the same command is given again.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.index import build_index
from pipeline.data.pace import Progress
from pipeline.data.parts import PartRecord, part_paths, plan_parts, read_record, write_part
from pipeline.data.pool import worker_processes
from pipeline.data.sources import Source
from pipeline.data.sources.folder import list_folder
from pipeline.data.sources.sprites import SpritesSource
from pipeline.data.splits import SplitSpec
from pipeline.errors import UserError
from pipeline.files import create_exclusive, publish, write_atomic, write_json

STAGE = "_stage"
SUMMARY = "pack.json"
BROKEN = "broken.jsonl"


@dataclass(frozen=True)
class PackReport:
    """What a pack left in its directory."""

    out: Path
    num_samples: int
    num_shards: int
    num_bytes: int  # of all shards
    classes: tuple[str, ...]
    num_broken: int
    broken: tuple[tuple[str, str], ...]  # (file, reason), at most 20; all of them in broken.jsonl
    ignored: dict[str, int]  # files that are no images we read: suffix -> count
    dataset_id: str


def pack_folder(
    source: Path,
    out: Path,
    *,
    shard_bytes: int = 256 << 20,
    shard_samples: int = 10_000,
    resize: int | None = None,
    shuffle_seed: int | None = None,
    workers: int = 1,
    split: SplitSpec | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the images below `source`; the first folder below it is the class.

    `resize`: shorter side in pixels, None = copy the files byte for byte. `shuffle_seed`: permute
    the samples over the shards, None = sorted by path. Broken images are left out and reported.
    """
    _check_bounds(shard_bytes=shard_bytes, shard_samples=shard_samples, workers=workers)
    if resize is not None:
        _check_bounds(resize=resize)
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"The output {out} lies inside the source {source}: name another folder.")
    found = list_folder(source, resize=resize, shuffle_seed=shuffle_seed)
    limits = {"shard_bytes": shard_bytes, "shard_samples": shard_samples}
    ignored = dict(found.ignored)
    return _pack(found, out, limits, workers, split or SplitSpec(), ignored, progress)


def pack_sprites(
    out: Path,
    *,
    count: int,
    seed: int = 0,
    shard_samples: int = 1_000,
    workers: int = 1,
    split: SplitSpec | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Draw and pack the built-in sprites: grey 64 x 64 pictures with known factors."""
    _check_bounds(count=count, shard_samples=shard_samples, workers=workers)
    limits = {"shard_bytes": 1 << 40, "shard_samples": shard_samples}
    source = SpritesSource(count, seed)
    return _pack(source, out, limits, workers, split or SplitSpec(), {}, progress)


def _check_bounds(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1.")


def _pack(
    source: Source,
    out: Path,
    limits: dict[str, int],
    workers: int,
    split: SplitSpec,
    ignored: dict[str, int],
    progress: Progress | None,
) -> PackReport:
    identity = {"source": dict(source.identity()), **limits}
    if not _is_complete(out, identity):
        stage = _open_stage(out, identity)
        ranges = plan_parts(
            source.sizes(), max_bytes=limits["shard_bytes"], max_samples=limits["shard_samples"]
        )
        _write_parts(source, ranges, stage, workers, progress)
        _publish(source, len(ranges), out, identity)
    shutil.rmtree(out / STAGE, ignore_errors=True)  # what is left of it holds nothing we need
    index = build_index(out, out=out, split=split, deep=True, workers=workers, progress=progress)
    return _report(out, ignored, index.dataset_id)


def _is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Tell whether `out` holds this very pack; raise UserError if it holds another."""
    summary = out / SUMMARY
    if not summary.exists():
        return False
    _check_same(out, json.loads(summary.read_bytes())["identity"], identity)
    return True


def _check_same(out: Path, found: Any, identity: dict[str, Any]) -> None:
    if found != identity:
        raise UserError(
            f"{out} already holds a pack of another source or with other settings:\n"
            f"  there: {json.dumps(found, sort_keys=True)}\n"
            f"  asked: {json.dumps(identity, sort_keys=True)}\n"
            "Name another directory, or remove this one."
        )


def _open_stage(out: Path, identity: dict[str, Any]) -> Path:
    """Create the stage with its plan, or go on with the one of a pack that was stopped."""
    stage = out / STAGE
    plan = stage / "plan.json"
    if not plan.exists():
        foreign = sorted(out.glob("*.tar"))
        if foreign:
            raise UserError(
                f"{out} already holds shards that this pack did not write, such as "
                f"{foreign[0].name}: name another directory."
            )
        try:
            stage.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{stage} cannot be created: {error.strerror}.") from error
        create_exclusive(plan, json.dumps(identity, sort_keys=True).encode())
    _check_same(out, json.loads(plan.read_bytes()), identity)
    return stage


def _write_parts(
    source: Source,
    ranges: Sequence[tuple[int, int]],
    stage: Path,
    workers: int,
    progress: Progress | None,
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
    """Move the parts to their final names, without gaps, and write the sidecars; redo is harmless.

    A part whose samples are all broken is no shard.
    """
    stage = out / STAGE
    shards: list[dict[str, Any]] = []
    broken: list[list[str]] = []
    for number in range(num_parts):
        record = read_record(stage, number)
        broken.extend(record.broken)
        if record.num_samples == 0:
            continue
        name = f"shard-{len(shards):06d}.tar"
        staged, _ = part_paths(stage, number)
        if staged.exists():
            publish(staged, out / name)
        shards.append(_entry(name, record))
    if not shards:
        raise UserError(f"None of the {len(broken)} images can be read, such as {broken[0]}.")
    for name, content in source.sidecars().items():
        write_atomic(out / name, content)
    if broken:
        lines = [json.dumps({"path": name, "reason": reason}) for name, reason in broken]
        write_atomic(out / BROKEN, ("\n".join(lines) + "\n").encode())
    summary = {"identity": identity, "shards": shards, "num_broken": len(broken)}
    write_json(out / SUMMARY, summary)


def _entry(name: str, record: PartRecord) -> dict[str, Any]:
    return {
        "name": name,
        "samples": record.num_samples,
        "bytes": record.num_bytes,
        "sha256": record.sha256,
    }


def _report(out: Path, ignored: dict[str, int], dataset_id: str) -> PackReport:
    summary = json.loads((out / SUMMARY).read_bytes())
    classes = out / "classes.json"
    broken: list[tuple[str, str]] = []
    if summary["num_broken"]:
        with (out / BROKEN).open() as lines:
            for line, _ in zip(lines, range(20), strict=False):
                entry = json.loads(line)
                broken.append((entry["path"], entry["reason"]))
    return PackReport(
        out=out,
        num_samples=sum(shard["samples"] for shard in summary["shards"]),
        num_shards=len(summary["shards"]),
        num_bytes=sum(shard["bytes"] for shard in summary["shards"]),
        classes=tuple(json.loads(classes.read_bytes())) if classes.exists() else (),
        num_broken=summary["num_broken"],
        broken=tuple(broken),
        ignored=ignored,
        dataset_id=dataset_id,
    )
