"""Do the shards still hold what the index says? Every problem is listed.

    <path>/index + the shards --verify_shards--> sizes, content hashes, tables, damage, duplicates

This reads every byte of every shard; a stream only checks sizes before it starts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.index import INDEX_DIRECTORY, MANIFEST, Index
from pipeline.data.scan import ShardEntry
from pipeline.errors import UserError
from pipeline.files import sha256_file

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ShardsReport:
    """What was looked at, and everything that is wrong."""

    path: Path
    dataset_id: str
    num_shards: int
    num_samples: int
    num_bytes: int
    problems: list[str]


def has_index(path: Path) -> bool:
    """Tell whether `path` is the directory of an index."""
    return (path / INDEX_DIRECTORY / MANIFEST).is_file()


def verify_shards(
    path: Path, *, shards: Path | None = None, progress: Progress | None = None
) -> ShardsReport:
    """Compare the shards with the index in `path`; `shards`: where they lie, None = in `path`.

    What was damaged already when the index was made is a problem, too. Raises UserError when there
    is no index.
    """
    index = Index.open(path)
    problems: list[str] = []
    for number, shard in enumerate(index.shards):
        problems += _check_shard(shard, (shards or path) / shard.name)
        problems += _check_table(index, number)
        if progress:
            progress(f"verify: {number + 1} of {len(index.shards)} shards")
    if index.num_duplicate_keys:
        problems.append(f"{index.num_duplicate_keys} keys occur more than once in the data set")
    num_bytes = sum(shard.bytes for shard in index.shards)
    return ShardsReport(
        path, index.dataset_id, len(index.shards), index.num_samples, num_bytes, problems
    )


def _check_shard(shard: ShardEntry, file: Path) -> Iterator[str]:
    try:
        size = file.stat().st_size
        changed = size == shard.bytes and sha256_file(file) != shard.sha256
    except OSError as error:
        yield f"{shard.name}: cannot be read: {error.strerror}"
        return
    if size != shard.bytes:
        yield f"{shard.name}: has {size} bytes, but was indexed with {shard.bytes}"
    elif changed:
        yield f"{shard.name}: has another content than was indexed (sha256)"
    for damage in shard.damage:
        yield f"{shard.name}: {damage.text}"


def _check_table(index: Index, number: int) -> Iterator[str]:
    try:
        index.table(number)
    except UserError as error:
        yield str(error)
