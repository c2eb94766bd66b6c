"""pack: a source of samples -> webdataset shards and their index, in one directory or URL.

source -> plan (which sample goes to which shard) -> parts, written by worker processes
       -> published as `shard-000000.tar` ... -> sidecars (`classes.json`, `broken.jsonl`)
       -> `pack.json`, last -> index with a checksum per member

The same source and settings give the same bytes for any number of workers, local or remote; a pack
that was killed continues when the same command is given again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.console import in_bytes, listing, named, names, plural
from pipeline.data.index import Index, build_index
from pipeline.data.index.manifest import IndexFiles
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pack.files import BROKEN, SUMMARY
from pipeline.data.pack.parts import few_shards, plan_parts
from pipeline.data.pack.shards import pack_locally, pack_remotely
from pipeline.data.pack.sources import PackSource
from pipeline.data.pack.sources.base import require_positive
from pipeline.data.progress import Progress
from pipeline.data.storage import is_url
from pipeline.data.storage.opening import local_path

MAX_BROKEN_SHOWN = 20


@dataclass(frozen=True)
class PackReport:
    """What a pack left in its directory."""

    out: Path | str
    num_samples: int
    num_samples_per_split: dict[str, int]
    num_shards: int
    num_bytes: int  # of all shards
    classes: tuple[str, ...]
    num_broken: int
    broken: tuple[tuple[str, str], ...]  # (file, reason), at most 20; all of them in broken.jsonl
    ignored: dict[str, int]  # files that are no images we read: suffix -> count
    dataset_id: str

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        samples = f"{plural(self.num_samples, 'sample')} in {plural(self.num_shards, 'shard')}"
        verdict = f"OK  {samples}, {in_bytes(self.num_bytes)}"
        if self.num_broken:
            verdict += f"; {plural(self.num_broken, 'file')} cannot be read"
        broken = f"cannot be read, so left out ({self.num_broken:,}; all in {BROKEN})"
        few = few_shards(self.num_shards, self.num_samples)
        return [
            verdict,
            *listing(
                {
                    "folder": str(self.out),
                    "splits": named(self.num_samples_per_split),
                    "classes": names(self.classes),
                    "files ignored": named(self.ignored),
                    "data set id": self.dataset_id,
                    broken: [f"{name}: {reason}" for name, reason in self.broken],
                    "WARN": few,
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
    if not is_url(out):
        source.check_out(Path(local_path(out)))
    samples = source.open()
    identity = {"source": dict(samples.identity()), **limits}
    ranges = plan_parts(
        samples.sizes(), max_bytes=source.shard_bytes, max_samples=source.shard_samples
    )
    if is_url(out):
        pack_remotely(samples, str(out), identity, ranges, workers, progress)
    else:
        out = Path(local_path(out))
        pack_locally(samples, out, identity, ranges, workers, progress)
    split = split or SplitSpec()
    index = build_index(out, out=out, split=split, deep=True, workers=workers, progress=progress)
    return _report(out, dict(samples.ignored), index)


def _report(out: Path | str, ignored: dict[str, int], index: Index) -> PackReport:
    files = IndexFiles(out)
    summary = json.loads(files.read(SUMMARY))
    broken: list[tuple[str, str]] = []
    if summary["num_broken"]:
        for line in files.read(BROKEN).splitlines()[:MAX_BROKEN_SHOWN]:
            entry = json.loads(line)
            broken.append((entry["path"], entry["reason"]))
    try:
        classes = json.loads(files.read("classes.json"))
    except FileNotFoundError:
        classes = ()
    return PackReport(
        out=files.path,
        num_samples=sum(shard["samples"] for shard in summary["shards"]),
        num_samples_per_split=index.samples_per_split(),
        num_shards=len(summary["shards"]),
        num_bytes=sum(shard["bytes"] for shard in summary["shards"]),
        classes=tuple(classes),
        num_broken=summary["num_broken"],
        broken=tuple(broken),
        ignored=ignored,
        dataset_id=index.dataset_id,
    )
