"""pack: a source of samples -> webdataset shards and their index, in one directory or URL.

source -> plan (which sample goes to which shard) -> parts, written by worker processes
       -> published as `shard-000000.tar` ... -> sidecars (`classes.json`, `broken.jsonl`)
       -> `pack.json`, last -> index with a checksum per member

The same source and settings give the same bytes for any number of workers, local or remote; a pack
that was killed goes on where it stopped when the same command is given again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.index import Index, build_index
from pipeline.data.index.manifest import IndexFiles
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pace import Progress
from pipeline.data.pack.files import BROKEN, SUMMARY
from pipeline.data.pack.local import pack_locally
from pipeline.data.pack.parts import plan_parts
from pipeline.data.pack.remote import pack_remotely
from pipeline.data.pack.sources import Source
from pipeline.data.pack.sources.folder import list_folder
from pipeline.data.pack.sources.sprites import SpritesSource
from pipeline.data.storage import is_url
from pipeline.data.storage.opening import local_path
from pipeline.errors import UserError

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


def pack_folder(
    source: Path,
    out: Path | str,
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
    if not is_url(out) and Path(local_path(out)).resolve().is_relative_to(source.resolve()):
        raise UserError(f"The output {out} lies inside the source {source}: name another folder.")
    found = list_folder(source, resize=resize, shuffle_seed=shuffle_seed)
    limits = {"shard_bytes": shard_bytes, "shard_samples": shard_samples}
    ignored = dict(found.ignored)
    return _pack(found, out, limits, workers, split or SplitSpec(), ignored, progress)


def pack_sprites(
    out: Path | str,
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
    out: Path | str,
    limits: dict[str, int],
    workers: int,
    split: SplitSpec,
    ignored: dict[str, int],
    progress: Progress | None,
) -> PackReport:
    identity = {"source": dict(source.identity()), **limits}
    ranges = plan_parts(
        source.sizes(), max_bytes=limits["shard_bytes"], max_samples=limits["shard_samples"]
    )
    if is_url(out):
        pack_remotely(source, str(out), identity, ranges, workers, progress)
    else:
        out = Path(local_path(out))
        pack_locally(source, out, identity, ranges, workers, progress)
    index = build_index(out, out=out, split=split, deep=True, workers=workers, progress=progress)
    return _report(out, ignored, index)


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
