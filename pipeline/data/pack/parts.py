"""Which samples go to which shard, and the writing of one shard.

sizes -> `plan_parts` -> (lo, hi) per shard, fixed before anything is written; so the shards are the
same if they are written in parallel, in any sequence and over several starts.
(lo, hi) -> `write_part` -> `part-000012.tar` and then its record `part-000012.json`: a part whose
record exists is whole.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.common.console import plural
from pipeline.common.errors import UserError
from pipeline.common.files import publish, sha256_file, temporary_name, write_json
from pipeline.common.tars import open_tar
from pipeline.data.pack.pictures import prepared
from pipeline.data.pack.sources.base import Broken, Part, Sample

# Shards from which no node lacks work: one per process of an export, and a node has up to 8 GPUs.
ENOUGH_SHARDS = 8
BETTER_SHARDS = 16  # what is advised, and packed unless told otherwise
SMALL_SHARD_SAMPLES = 32  # a data set that would be cut into smaller ones is small anyway
TAR_BLOCK = 512  # every member takes a header of one block, and its content is padded to blocks


def few_shards(num_shards: int, num_samples: int, processes: int = 1) -> str:
    """Say that an export of so many shards leaves processes without work; empty if it is well."""
    if num_shards >= max(processes, ENOUGH_SHARDS):
        return ""
    better = max(BETTER_SHARDS, processes)
    if num_samples < better * SMALL_SHARD_SAMPLES:
        return ""
    return (
        f"{plural(num_shards, 'shard')}: one task each, so at most "
        f"{num_shards} of an export's processes {'has' if num_shards == 1 else 'have'} work; pack "
        f"anew with --shard-samples {-(-num_samples // better)} for {better} shards"
    )


def enough_shards(num_samples: int, max_samples: int) -> int:
    """Return how many samples a shard holds at most, so that there are enough shards."""
    if num_samples < BETTER_SHARDS * SMALL_SHARD_SAMPLES:
        return max_samples
    return min(max_samples, -(-num_samples // BETTER_SHARDS))


@dataclass(frozen=True)
class PartRecord:
    """What one written part holds."""

    num_samples: int
    num_bytes: int
    sha256: str
    broken: list[list[str]]  # [name, reason]


def _cut(sizes: Sequence[int], max_bytes: int, max_samples: int) -> list[tuple[int, int]]:
    """Cut into contiguous ranges within both bounds; a sample above `max_bytes` gets its own."""
    ranges: list[tuple[int, int]] = []
    lo = total = 0
    for number, size in enumerate(sizes):
        if number > lo and (total + size > max_bytes or number - lo == max_samples):
            ranges.append((lo, number))
            lo, total = number, 0
        total += size
    if lo < len(sizes):
        ranges.append((lo, len(sizes)))
    return ranges


def plan_parts(sizes: Sequence[int], *, max_bytes: int, max_samples: int) -> list[tuple[int, int]]:
    """Return the range (lo, hi) of every shard, all of about the same size.

    Neither bound is exceeded, except by a single sample that is larger than `max_bytes` alone.
    """
    in_tar = [(size // TAR_BLOCK + 2) * TAR_BLOCK for size in sizes]
    ranges = _cut(in_tar, max_bytes, max_samples)
    count = len(ranges)
    # The greedy cut leaves a small remainder at the end: prefer the same number of even shards, if
    # the bounds allow it.
    even_samples = -(-len(sizes) // max(count, 1))
    even_bytes = -(-sum(in_tar) // max(count, 1)) + max(in_tar, default=0)
    even = _cut(in_tar, min(max_bytes, even_bytes), min(max_samples, max(even_samples, 1)))
    return even if len(even) == count else ranges


def part_paths(stage: Path, number: int) -> tuple[Path, Path]:
    """Return where a part and its record lie."""
    return stage / f"part-{number:06d}.tar", stage / f"part-{number:06d}.json"


def read_record(stage: Path, number: int) -> PartRecord:
    """Return the record of a written part."""
    return PartRecord(**json.loads(part_paths(stage, number)[1].read_bytes()))


def sound_samples(part: Part, broken: list[list[str]]) -> Iterator[Sample]:
    """Yield a part's samples as they are packed; append what cannot be read to `broken`."""
    for found in part.read():
        sample = found if isinstance(found, Broken) else prepared(found)
        if isinstance(sample, Broken):
            broken.append([sample.name, sample.reason])
        else:
            yield sample


def write_part(part: Part, stage: Path, number: int) -> int:
    """Write one part and then its record; return the number. Two writers at once do no harm."""
    path, record_path = part_paths(stage, number)
    temporary = temporary_name(path)
    broken: list[list[str]] = []
    num_samples = 0
    with open_tar(temporary) as write:
        last = None
        for sample in sound_samples(part, broken):
            if sample.key == last:
                raise UserError(f"Two samples in a row have the key {last}: name another one.")
            write(last := sample.key, sample.members)
            num_samples += 1
    record = PartRecord(num_samples, temporary.stat().st_size, sha256_file(temporary), broken)
    publish(temporary, path)
    write_json(record_path, asdict(record))
    return number
