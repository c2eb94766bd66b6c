"""Building an index: worker processes scan the shards, and the manifest is written last.

    shards --build_index--> <out>/index/tables/<shard>.arrow  (one per shard)
                            <out>/index/manifest.json         (last: atomic)

The same shards and split rule give the same bytes for any number of workers and restarts, and the
same dataset_id for local and remote shards.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.common.console import plural
from pipeline.common.errors import UserError
from pipeline.data.index.left_out import COMPRESSED, Counts, Tally, lines_of, summed
from pipeline.data.index.location import IndexLocation, index_location
from pipeline.data.index.manifest import check_shard_name, make_manifest, table_path
from pipeline.data.index.reader import Index
from pipeline.data.index.scan import ScannedShard, ShardTask, index_shard
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pool import worker_processes
from pipeline.data.progress import Progress, ProgressTracker
from pipeline.data.storage import open_storage
from pipeline.data.storage.patterns import NUM_SHOWN, FoundShards, find_shards

PARALLEL_FROM_BYTES = 32 << 20  # below it, starting worker processes costs more than it saves


def build_index(
    shards: Path | str,
    *,
    out: Path | str | None = None,
    split: SplitSpec | None = None,
    deep: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> Index:
    """Index a directory, URL, glob or brace pattern of shards into `<out>/index`.

    `out`: a directory or URL, None = beside the shards. `deep`: with a checksum of every member.
    Tables of unchanged shards are reused, so a stopped build can continue. Damage, duplicate keys
    and what is left out are reported in the result, not raised. Raises UserError, also if there is
    no sample at all.
    """
    found = find_shards(shards)
    for name in found.names:
        check_shard_name(name)
    if workers < 1:
        raise UserError(f"workers is {workers}, but must be at least 1.")
    split = split or SplitSpec()
    out = found.root if out is None else out
    with index_location(out, found.names) as location:
        tasks = [
            ShardTask(found.root, name, table_path(location.folder, name), split, deep)
            for name in found.names
        ]
        scanned = _scan_all(found, tasks, workers, location, progress)
        ordered = [scanned[name] for name in found.names]
        beside = _beside(found)
        _require_samples(shards, ordered, beside)
        manifest = make_manifest(ordered, split, found.root, location.folder, beside)
        location.finish(manifest, found.names)
    return Index.open(out)


def _beside(found: FoundShards) -> Counts:
    """Count the files beside the shards that cannot be read because they are compressed."""
    tally = Tally()
    for name in found.compressed:
        tally.add(COMPRESSED, name)
    return tally.counts


def _require_samples(shards: Path | str, scanned: Sequence[ScannedShard], beside: Counts) -> None:
    """Raise UserError, saying what was found, if there is no sample at all."""
    entries = [result.entry for result in scanned]
    if any(entry.samples for entry in entries):
        return
    damage = [f"{entry.name} {fault.text}" for entry in entries for fault in entry.damage]
    counts = summed({entry.name: entry.left_out for entry in entries} | {"": beside})
    found = [*damage[:NUM_SHOWN], *lines_of(counts)]
    if len(damage) > NUM_SHOWN:
        found.insert(NUM_SHOWN, f"{len(damage) - NUM_SHOWN:,} more of the kind")
    raise UserError(
        f"{shards}: no sample in {plural(len(entries), 'shard')}. "
        f"{'; '.join(found) or 'No member at all'}."
    )


def _scan_all(
    found: FoundShards,
    tasks: Sequence[ShardTask],
    workers: int,
    location: IndexLocation,
    progress: Progress | None,
) -> dict[str, ScannedShard]:
    with closing(open_storage(found.root)) as storage:
        states = storage.states(found.names)
    sizes = {name: state.num_bytes for name, state in states.items() if state is not None}
    num_bytes = sum(sizes.values())
    tracker = ProgressTracker("index", len(tasks), num_bytes, progress)
    scanned: dict[str, ScannedShard] = {}
    for result in _scanned(tasks, 1 if num_bytes < PARALLEL_FROM_BYTES else workers):
        name = result.entry.name
        scanned[name] = result
        if result.is_written:
            location.add_table(name)
        tracker.add(sizes.get(name, 0), is_read=result.is_read)
    return scanned


def _scanned(tasks: Sequence[ShardTask], workers: int) -> Iterator[ScannedShard]:
    """Yield the shards as they are finished."""
    workers = min(workers, len(tasks))
    if workers == 1:
        yield from map(index_shard, tasks)
        return
    with worker_processes(workers) as pool:
        for future in as_completed([pool.submit(index_shard, task) for task in tasks]):
            yield future.result()


def summary(index: Index) -> dict[str, Any]:
    """Return the report of an index that was just built."""
    return {
        "index": index.path,
        "dataset_id": index.dataset_id,
        "num_shards": len(index.shards),
        "num_samples": index.num_samples,
        "num_samples_per_split": index.samples_per_split(),
        "num_bytes": sum(shard.bytes for shard in index.shards),
        "num_duplicate_keys": index.num_duplicate_keys,
        "duplicate_keys": index.duplicate_keys,
        "damage": [f"{shard}: {damage.text}" for shard, damage in index.damage],
        "suffixes": index.suffixes,
        "left_out": index.left_out,
    }
