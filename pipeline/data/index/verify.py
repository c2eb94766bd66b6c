"""Compare the shards with their index and list every problem.

    <path>/index + the shards, one forward pass each --verify_shards--> sizes, content hashes,
                       CRC-32 of every member, tables, damage, duplicates; images if asked;
                       of local shards: does Python's tarfile find the same members?

This reads all bytes of all shards; a stream checks sizes and tags only, before it starts.
"""

import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.console import in_bytes, listing, names, plural
from pipeline.common.errors import UserError
from pipeline.data.decode import DecodeError, ImageDecode, missing_member
from pipeline.data.decode.codecs import PixelRules, full_scale, read_pixels
from pipeline.data.decode.libraries import PILLOW_MAX_PIXELS
from pipeline.data.index.one_pass import OnePass
from pipeline.data.index.reader import Index
from pipeline.data.index.scan import ShardEntry
from pipeline.data.index.table import ShardTable
from pipeline.data.index.tar import TarSample
from pipeline.data.index.tar_scan import NO_CHECKSUM
from pipeline.data.index.tarfile_check import differences
from pipeline.data.progress import Progress, ProgressTracker
from pipeline.data.storage import Storage, is_url, open_storage

IMAGES = ImageDecode()  # the defaults of a config
# What is right in a shard does not depend on a run's own bound of pixels.
RULES = PixelRules(IMAGES.channels, IMAGES.background, PILLOW_MAX_PIXELS)
NOT_COMPARED = "whether Python's tarfile finds the same members: a request each in remote shards"

Job = Future[DecodeError | None]


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

    not_indexed: shards that are not in the index, which may be intended. left_out: what the index
    counted, in words. notes: what was not checked.
    """

    path: Path | str
    dataset_id: str
    num_shards: int
    num_samples: int
    num_bytes: int
    problems: list[str]
    bad_samples: list[BadSample]
    not_indexed: list[str]
    left_out: list[str]
    notes: list[str]

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
                    "left out, or not as meant": self.left_out,
                    "not checked": self.notes,
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
        problems.append(
            f"{plural(index.num_duplicate_keys, 'sample')} with the key of an earlier one"
        )
    return ShardsReport(
        index.path,
        index.dataset_id,
        len(index.shards),
        index.num_samples,
        num_bytes,
        problems,
        bad,
        index.not_indexed(root),
        index.left_out_lines(),
        [NOT_COMPARED] if is_url(root) else [],
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
        yield f"{shard.name}: is missing; if it lies elsewhere, give its place by --shards"
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
            elif table is not None and table.num_rows and not is_url(storage.root):
                yield from differences(Path(storage.where(shard.name)), table)
    except OSError as error:
        yield f"{shard.name}: cannot be read: {error}"


def _bad_samples(
    shard: ShardEntry, table: ShardTable, reader: OnePass, pool: ThreadPoolExecutor | None
) -> Iterator[BadSample]:
    """Yield the bad samples of one shard during the pass over its bytes."""
    decoding: deque[tuple[str, Job]] = deque()
    samples = table.samples() if table.has_checksums or pool is not None else []
    shared = _shared_offsets(samples)
    seen: dict[tuple[int, bool], tuple[int, Job | None]] = {}
    for sample in samples:
        image = next((name for name in IMAGES.suffixes if name in sample.members), None)
        job, wrong = None, list[str]()
        for suffix, where in sample.members.items():
            is_image = pool is not None and suffix == image
            checked = seen.get((where[0], is_image))
            if checked is None:
                checked = _check_member(reader, where, pool if is_image else None, table)
            if where[0] in shared:
                seen[where[0], is_image] = checked
            job = checked[1] if is_image else job
            if sample.checksums.get(suffix, NO_CHECKSUM) not in (NO_CHECKSUM, checked[0]):
                wrong.append(f".{suffix}")
        if wrong:
            reason = f"another content than was indexed: {', '.join(wrong)}"
            yield BadSample(shard.name, sample.key, "checksum", reason)
        if pool is not None:
            decoding.append((sample.key, job or pool.submit(_fault_of, None)))
        # At most 16 encoded images wait in memory; results keep the order of the shard.
        yield from _decoded(shard, decoding, keep=16)
    yield from _decoded(shard, decoding, keep=0)


def _check_member(
    reader: OnePass, where: tuple[int, int], pool: ThreadPoolExecutor | None, table: ShardTable
) -> tuple[int, Job | None]:
    """Return a member's CRC-32, if the table has it, and the job of decoding it in a pool."""
    if pool is None:
        return (reader.crc32(*where) if table.has_checksums else NO_CHECKSUM), None
    content = reader.read(*where)
    return zlib.crc32(content), pool.submit(_fault_of, content)


def _shared_offsets(samples: Sequence[TarSample]) -> set[int]:
    """Where members lie that are more than one: hard links. Their content is read once."""
    offsets = Counter(offset for sample in samples for offset, _ in sample.members.values())
    return {offset for offset, count in offsets.items() if count > 1}


def _decoded(
    shard: ShardEntry, decoding: deque[tuple[str, Job]], *, keep: int
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
