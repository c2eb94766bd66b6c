"""pack: a source of samples -> webdataset shards and their index, in one directory or URL.

source -> plan (which sample goes to which shard) -> parts, written by worker processes
       -> published as `shard-000000.tar` ... -> sidecars (`classes.json`, `broken.jsonl`)
       -> `pack.json`, last -> index with a checksum per member -> does it find what was packed?

The same source and settings give the same bytes for any number of workers, local or remote; a pack
that was killed continues when the same command is given again.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.common.console import in_bytes, listing, named, names, plural
from pipeline.data.index import Index, build_index
from pipeline.data.index.manifest import IndexFiles
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pack.files import BROKEN, SUMMARY, check_same
from pipeline.data.pack.parts import enough_shards, plan_parts, sound_samples
from pipeline.data.pack.shards import clear_stage, find_pack, pack_locally, pack_remotely
from pipeline.data.pack.sources import PackSource, Samples
from pipeline.data.pack.sources.base import require_positive
from pipeline.data.progress import Progress
from pipeline.data.storage import is_url
from pipeline.data.storage.opening import local_path

MAX_SHOWN = 20  # broken samples, and lost ones


@dataclass(frozen=True)
class PackReport:
    """What a pack left in its directory."""

    out: Path | str
    num_samples: int
    num_samples_per_split: dict[str, int]
    num_shards: int
    num_bytes: int  # of all shards
    classes: tuple[str, ...]
    num_without_label: int  # 0 where no sample has one
    num_duplicate_keys: int  # of samples that repeat the key of an earlier one
    num_broken: int
    broken: tuple[tuple[str, str], ...]  # (file, reason), at most 20; all of them in broken.jsonl
    ignored: dict[str, int]  # what is no sample by its kind or name: kind or suffix -> count
    lost: tuple[str, ...]  # keys that were packed and are not in the index, at most 20
    dataset_id: str

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        samples = f"{plural(self.num_samples, 'sample')} in {plural(self.num_shards, 'shard')}"
        verdict = f"OK  {samples}, {in_bytes(self.num_bytes)}"
        if self.num_broken:
            verdict += f"; {plural(self.num_broken, 'file')} left out"
        if self.lost:
            verdict = f"FAILED  {samples} were packed, but the index does not find all of them"
        broken = f"left out ({self.num_broken:,}; all in {BROKEN})"
        return [
            verdict,
            *listing(
                {
                    "lost, by their keys": list(self.lost),
                    "folder": str(self.out),
                    "splits": named(self.num_samples_per_split),
                    "classes": names(self.classes),
                    "without a class": self.num_without_label or None,
                    "keys that come again": self.num_duplicate_keys or None,
                    "ignored": named(self.ignored),
                    "data set id": self.dataset_id,
                    broken: [f"{name}: {reason}" for name, reason in self.broken],
                }
            ),
        ]


def pack(
    source: PackSource,
    out: Path | str,
    *,
    workers: int = 1,
    split: SplitSpec | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a source into a directory or below a URL, and index the shards.

    Broken samples are left out and reported. Raises UserError for settings out of bounds, a source
    without samples, and an `out` that holds other data.
    """
    limits = {"shard_bytes": source.shard_bytes, "shard_samples": source.shard_samples}
    require_positive(**limits, workers=workers)
    out = str(out) if is_url(out) else Path(local_path(out))
    if isinstance(out, Path):
        source.check_out(out)
    samples = source.open()
    found = find_pack(out)
    identity = _identity(source, samples, found.identity)
    check_same(out, found.identity, identity)
    ranges = plan_parts(
        samples.sizes(), max_bytes=source.shard_bytes, max_samples=identity["shard_samples"]
    )
    if not found.is_complete:
        if isinstance(out, Path):
            pack_locally(samples, out, identity, ranges, workers, progress)
        else:
            pack_remotely(samples, out, identity, ranges, workers, progress)
    clear_stage(out, len(ranges))
    split = split or SplitSpec()
    index = build_index(out, out=out, split=split, deep=True, workers=workers, progress=progress)
    return _report(out, samples, ranges, index)


def _identity(source: PackSource, samples: Samples, found: Any) -> dict[str, Any]:
    """Return what decides over the bytes of a pack.

    found: that of the pack that is there. One without `shard_samples` may have been begun when all
    data sets had the same default, and is gone on with.
    """
    fixed = {"source": dict(samples.identity()), "shard_bytes": source.shard_bytes}

    def with_samples(number: int) -> dict[str, Any]:
        return {**fixed, "shard_samples": number}

    if source.shard_samples is not None:
        return with_samples(source.shard_samples)
    former = with_samples(source.MAX_SHARD_SAMPLES)
    if found == former:
        return former
    return with_samples(enough_shards(len(samples), source.MAX_SHARD_SAMPLES))


def _lost(
    samples: Samples,
    ranges: Sequence[tuple[int, int]],
    shards: Sequence[Mapping[str, Any]],
    index: Index,
) -> Iterator[str]:
    """Yield the keys of samples that are in the shards, but not in their index."""
    number_of = {shard.name: number for number, shard in enumerate(index.shards)}
    counts = [shard.samples for shard in index.shards]
    if all(counts[number_of[shard["name"]]] == shard["samples"] for shard in shards):
        return
    keys = (s.key for lo, hi in ranges for s in sound_samples(samples.part(lo, hi), []))
    for shard in shards:
        packed = Counter(islice(keys, shard["samples"]))
        yield from packed - Counter(index.table(number_of[shard["name"]]).keys())


def _report(
    out: Path | str, samples: Samples, ranges: Sequence[tuple[int, int]], index: Index
) -> PackReport:
    files = IndexFiles(out)
    summary = json.loads(files.read(SUMMARY))
    shards = summary["shards"]
    broken: list[tuple[str, str]] = []
    if summary["num_broken"]:
        for line in files.read(BROKEN).splitlines()[:MAX_SHOWN]:
            entry = json.loads(line)
            broken.append((entry["path"], entry["reason"]))
    try:
        classes = json.loads(files.read("classes.json"))
    except FileNotFoundError:
        classes = ()
    num_labels = (index.suffixes or {}).get("cls", 0)
    return PackReport(
        out=files.path,
        num_samples=sum(shard["samples"] for shard in shards),
        num_samples_per_split=index.samples_per_split(),
        num_shards=len(shards),
        num_bytes=sum(shard["bytes"] for shard in shards),
        classes=tuple(classes),
        num_without_label=index.num_samples - num_labels if num_labels else 0,
        num_duplicate_keys=index.num_duplicate_keys,
        num_broken=summary["num_broken"],
        broken=tuple(broken),
        ignored=dict(samples.ignored),
        lost=tuple(islice(_lost(samples, ranges, shards, index), MAX_SHOWN)),
        dataset_id=index.dataset_id,
    )
