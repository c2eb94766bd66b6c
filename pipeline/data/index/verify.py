"""Compare the shards with their index and list every problem.

    <path>/index + the shards, one forward pass each --verify_shards--> sizes, content hashes,
                       CRC-32 of every member, tables, damage, duplicates; images if asked

This reads all bytes of all shards; a stream checks sizes and tags only, before it starts.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.console import in_bytes, listing, names, plural
from pipeline.common.errors import UserError
from pipeline.data.decode import DecodeError, ImageDecode, missing_member
from pipeline.data.decode.codecs import PixelRules, full_scale, read_pixels
from pipeline.data.index.one_pass import OnePass
from pipeline.data.index.reader import Index
from pipeline.data.index.scan import ShardEntry
from pipeline.data.index.table import ShardTable
from pipeline.data.progress import Progress, ProgressTracker
from pipeline.data.storage import Storage, open_storage

IMAGES = ImageDecode()  # the defaults of a config
RULES = PixelRules(IMAGES.channels, IMAGES.background, IMAGES.max_pixels)


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used. stage: "checksum", or that of a DecodeError."""

    shard: str
    key: str
    stage: str
    reason: str


@dataclass(frozen=True)
class ShardsReport:
    """What was checked, and all problems.

    not_indexed: shards that are not in the index, which may be intended.
    """

    path: Path | str
    dataset_id: str
    num_shards: int
    num_samples: int
    num_bytes: int
    problems: list[str]
    bad_samples: list[BadSample]
    not_indexed: list[str]

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        shards = f"{plural(self.num_shards, 'shard')}, {in_bytes(self.num_bytes)}"
        verdict = f"OK  {plural(self.num_samples, 'sample')} in {shards}, as indexed"
        if self.problems:
            verdict = f"FAILED  {plural(len(self.problems), 'problem')} in {shards}"
        bad = [f"{b.shard}, {b.key}: {b.stage}: {b.reason}" for b in self.bad_samples]
        return [
            verdict,
            *listing(
                {
                    "index": str(self.path),
                    "data set id": self.dataset_id,
                    "problems": self.problems,
                    "bad samples": bad,
                    "shards that are not indexed": names(self.not_indexed),
                }
            ),
        ]


def verify_shards(
    path: Path | str,
    *,
    shards: Path | str | None = None,
    decode: bool = False,
    threads: int = 2,
    progress: Progress | None = None,
) -> ShardsReport:
    """Compare the shards with the index in `path`; `shards`: where they lie, None = in `path`.

    `decode`: also decode every sample's image, in `threads` threads. Damage that the index already
    lists is a problem, too. Raises UserError if there is no index, or no image.
    """
    if threads < 1:
        raise UserError(f"threads is {threads}, but must be at least 1.")
    index = Index.open(path)
    if decode:
        index.check_suffixes(IMAGES.suffixes)
    problems: list[str] = []
    bad: list[BadSample] = []
    num_bytes = sum(shard.bytes for shard in index.shards)
    tracker = ProgressTracker("verify", len(index.shards), num_bytes, progress)
    root = index.path if shards is None else shards
    with (
        closing(open_storage(root)) as storage,
        ThreadPoolExecutor(threads, thread_name_prefix="verify-decode") as pool,
    ):
        for number, shard in enumerate(index.shards):
            problems += _check_shard(index, number, storage, pool if decode else None, bad)
            tracker.add(shard.bytes)
    if bad:
        problems.append(f"{len(bad)} samples are bad")
    if index.num_duplicate_keys:
        problems.append(f"{index.num_duplicate_keys} keys occur more than once in the data set")
    return ShardsReport(
        index.path,
        index.dataset_id,
        len(index.shards),
        index.num_samples,
        num_bytes,
        problems,
        bad,
        index.not_indexed(root),
    )


def _check_shard(
    index: Index,
    number: int,
    storage: Storage,
    pool: ThreadPoolExecutor | None,
    bad: list[BadSample],
) -> Iterator[str]:
    shard = index.shards[number]
    try:
        table = index.table(number)
    except UserError as error:
        yield str(error)
        table = None
    for damage in shard.damage:
        yield f"{shard.name}: {damage.text}"
    state = storage.states([shard.name])[shard.name]
    if state is None:
        yield f"{shard.name}: is missing"
        return
    if state.num_bytes != shard.bytes:
        yield f"{shard.name}: has {state.num_bytes} bytes, but was indexed with {shard.bytes}"
        return
    try:
        with OnePass(storage, shard.name, shard.bytes) as reader:
            if table is not None:
                bad += _bad_samples(shard, table, reader, pool)
            if reader.sha256() != shard.sha256:
                yield f"{shard.name}: has another content than was indexed (sha256)"
    except OSError as error:
        yield f"{shard.name}: cannot be read: {error}"


def _bad_samples(
    shard: ShardEntry, table: ShardTable, reader: OnePass, pool: ThreadPoolExecutor | None
) -> Iterator[BadSample]:
    """Yield the bad samples of one shard during the pass over its bytes."""
    decoding: deque[tuple[str, Future[DecodeError | None]]] = deque()
    for sample in table.samples() if table.has_checksums or pool is not None else ():
        image = next((name for name in IMAGES.suffixes if name in sample.members), None)
        content, wrong = b"", list[str]()
        for suffix, (offset, num_bytes) in sample.members.items():
            is_wanted = pool is not None and suffix == image
            piece = reader.read(offset, num_bytes) if is_wanted else None
            content = content if piece is None else piece
            known = sample.checksums.get(suffix)
            if known is not None:
                found = reader.crc32(offset, num_bytes) if piece is None else zlib.crc32(piece)
                wrong += [] if found == known else [f".{suffix}"]
        if wrong:
            reason = f"another content than was indexed: {', '.join(wrong)}"
            yield BadSample(shard.name, sample.key, "checksum", reason)
        if pool is not None:
            job = pool.submit(_fault_of, None if image is None else content)
            decoding.append((sample.key, job))
        # At most 16 encoded images wait in memory; results keep the order of the shard.
        yield from _decoded(shard, decoding, keep=16)
    yield from _decoded(shard, decoding, keep=0)


def _decoded(
    shard: ShardEntry, decoding: deque[tuple[str, Future[DecodeError | None]]], *, keep: int
) -> Iterator[BadSample]:
    while len(decoding) > keep:
        key, job = decoding.popleft()
        error = job.result()
        if error is not None:
            yield BadSample(shard.name, key, error.stage, error.reason)


def _fault_of(content: bytes | None) -> DecodeError | None:
    """Return the error of decoding an image in full size; None = no error."""
    try:
        if content is None:
            raise missing_member()
        read_pixels(content, RULES, full_scale)
    except DecodeError as error:
        return error
    return None
