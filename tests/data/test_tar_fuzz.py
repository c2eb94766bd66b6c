"""A thousand damaged tars: no crash, no hang, no code run, and every loss reported, no other.

The manifest is the index of the healthy shard. A sample is lost if not all its members are
delivered with their bytes. What must hold for every mutation:

1. The healthy index (`--deep`) over the damaged shard: `verify` names the samples with changed
   bytes, exactly; where the size changed, the stream refuses the shard.
2. A new index of the damaged shard. EXACT damage: a lost sample's header or content is touched by
   a reported damage, unless only contents or PAX records were changed in place, which no tar can
   show (1. and the decoder do); and no intact sample is touched by one. SHIFTED and FORGED: samples
   that the mutation does not touch are intact or reported; what is forged consistently is read as
   webdataset reads it.
"""

import io
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from webdataset import tariterators

from pipeline.common.errors import UserError
from pipeline.data.decode import ArrayDecode, ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.index.left_out import Damage
from pipeline.data.index.tar import group_samples
from pipeline.data.index.tar_header import BLOCK, padded
from pipeline.data.index.tar_scan import MAX_EXTENSION_BYTES, TarScan
from pipeline.data.index.verify import verify_shards
from pipeline.data.settings import DataConfig
from tests.data.tar_mutations import (
    EXACT,
    FORGED,
    NUM_SAMPLES,
    SHIFTED,
    Boom,
    Data,
    Mutate,
    Part,
    Shard,
    new_shard,
    seal,
    wild_size,
)
from tests.shards import open_stream

KINDS = (*EXACT, *SHIFTED, *FORGED)
MAX_SECONDS = 5.0  # per case; the usual one takes milliseconds
COUNTS = [
    pytest.param(10, marks=pytest.mark.fault),
    pytest.param(100, marks=pytest.mark.soak),
]
each_kind = pytest.mark.parametrize("mutate", KINDS, ids=lambda kind: kind.__name__)

Samples = dict[str, dict[str, bytes]]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that appears if the content of a shard is ever run or unpickled."""
    return tmp_path / "was-run"


def mutated(shard: Shard, mutate: Mutate, seed: int) -> bytes:
    data = Data(shard.data)
    mutate(shard, data, np.random.default_rng([seed, KINDS.index(mutate)]))
    return bytes(data)


class Meter:
    """Serves a scan, and sees that it neither asks for much at once nor for everything often."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.total = 0

    def read(self, offset: int, num_bytes: int) -> bytes:
        assert 0 <= num_bytes <= MAX_EXTENSION_BYTES
        piece = self.data[offset : offset + num_bytes]
        self.total += len(piece)
        return piece


def scanned(data: bytes) -> tuple[Samples, list[Damage]]:
    meter = Meter(data)
    scan = TarScan(meter.read, len(data))
    started = time.monotonic()
    found: Samples = {}
    for sample in group_samples(scan):
        for suffix, (offset, size) in sample.members.items():
            assert BLOCK <= offset <= offset + size <= len(data)
            found.setdefault(sample.key, {})[suffix] = data[offset : offset + size]
    assert time.monotonic() - started < MAX_SECONDS
    assert meter.total <= 12 * len(data) + 10 * BLOCK
    return found, scan.damage


def lost_in(shard: Shard, found: Samples) -> set[str]:
    return {
        key
        for key, members in shard.samples().items()
        if not members.items() <= found.get(key, {}).items()
    }


def touched(parts: Iterable[Part], spans: Iterable[tuple[float, float]]) -> set[str]:
    """Keys of files whose header or content shares a byte with a span."""
    return {
        part.key
        for part in parts
        for start, stop in spans
        if start < part.offset + part.num_bytes and stop > part.header
    }


def spans_of(damage: Iterable[Damage], size: int) -> list[tuple[float, float]]:
    """Bytes that a report says are lost; without an end marker, all that may have come after."""
    spans = [(float(d.offset), float(d.offset + d.num_bytes)) for d in damage]
    ends = any(d.kind in ("no_end_marker", "truncated") for d in damage)
    return [*spans, (size, float("inf"))] if ends else spans


def changed_places(shard: Shard, data: bytes) -> set[int]:
    """Offsets of blocks that differ in place."""
    one, other = (np.frombuffer(d[: len(d) // BLOCK * BLOCK], np.uint8) for d in (shard.data, data))
    size = min(len(one), len(other))
    blocks = (one[:size] != other[:size]).reshape(-1, BLOCK).any(1)
    return set((np.flatnonzero(blocks) * BLOCK).tolist())


def silently_changed(shard: Shard, data: bytes) -> set[str]:
    """Keys of samples whose contents or extension records were changed in place."""
    places = changed_places(shard, data) - set(shard.headers)
    return {
        part.key
        for part in shard.parts
        if places & set(range(part.start, part.offset + padded(part.num_bytes), BLOCK))
    }


@each_kind
@pytest.mark.parametrize("count", COUNTS)
def test_a_new_index_of_a_damaged_shard_reports_what_is_lost(
    mutate: Mutate, count: int, marker: Path
):
    for seed in range(count):
        shard = new_shard(seed, marker)
        data = mutated(shard, mutate, seed)
        found, damage = scanned(data)
        lost = lost_in(shard, found)
        if mutate in EXACT:
            reported = touched(shard.parts, spans_of(damage, len(data)))
            if mutate.__name__ == "other_file":
                assert (found, len(lost)) == ({}, len(shard.samples()))
                assert damage
                continue
            assert lost - silently_changed(shard, data) <= reported, seed
            assert reported <= lost, seed
        else:
            assert untouched_by(shard, data) - touched_after(shard, data, damage) <= (
                set(shard.samples()) - lost
            ), seed
    assert not marker.exists()


def common_ends(shard: Shard, data: bytes) -> tuple[int, int]:
    """Bytes that both have in common at the start and at the end."""
    size = min(len(shard.data), len(data))
    one, other = np.frombuffer(shard.data, np.uint8), np.frombuffer(data, np.uint8)
    front = np.flatnonzero(one[:size] != other[:size])
    head = int(front[0]) if len(front) else size
    back = np.flatnonzero(one[::-1][: size - head] != other[::-1][: size - head])
    return head, int(back[0]) if len(back) else size - head


def untouched_by(shard: Shard, data: bytes) -> set[str]:
    """Keys of samples all of whose bytes lie in what is the same at the start or at the end.

    The sample just before the change counts as touched: a lie about its size ends in the change.
    """
    head, tail = common_ends(shard, data)
    touched_keys = {
        part.key
        for part in shard.parts
        if part.offset + padded(part.num_bytes) > head and part.start < len(shard.data) - tail
    }
    return set(shard.samples()) - touched_keys


def touched_after(shard: Shard, data: bytes, damage: list[Damage]) -> set[str]:
    """Keys of samples that reported damage touches, at the places where they lie now."""
    head, _ = common_ends(shard, data)
    shift = len(data) - len(shard.data)
    moved = [
        Part(p.key, p.suffix, p.start, p.header + by, p.offset + by, p.num_bytes)
        for p in shard.parts
        for by in ({0} if p.offset + p.num_bytes <= head else {shift})
    ]
    swallowed = swallowed_by_a_lie(shard, data, head)
    return touched(moved, [*spans_of(damage, len(data)), *swallowed])


def swallowed_by_a_lie(shard: Shard, data: bytes, head: int) -> list[tuple[float, float]]:
    """A size, forged or of a content that lost blocks, that ends exactly at another header says
    that all before it is content: nothing is wrong with such a tar. The span of it, as it is now,
    with the member that it ends at, whose long name may stand in it.
    """
    header = max((block for block in shard.headers if block <= head), default=0)
    block = data[header : header + BLOCK]
    try:
        size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return []
    stop = header + BLOCK + padded(size)
    is_header = data[stop + 257 : stop + 262] == b"ustar"
    is_end = not any(data[stop : stop + 2 * BLOCK])
    return [(header, stop + 1)] if is_header or is_end else []


def webdataset_reads(data: bytes) -> Samples | None:
    """What webdataset makes of it; None if it raises."""
    opened = [{"url": "a.tar", "stream": io.BytesIO(data)}]
    found: Samples = {}
    try:
        for sample in tariterators.group_by_keys(tariterators.tar_file_expander(opened)):
            members = {k: v for k, v in sample.items() if not k.startswith("__")}
            found.setdefault(sample["__key__"], {}).update(members)
    except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError):
        return None
    return found


@pytest.mark.parametrize("mutate", FORGED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", COUNTS)
def test_what_is_forged_consistently_is_read_as_webdataset_reads_it(
    mutate: Mutate, count: int, marker: Path
):
    num_equal = 0
    for seed in range(count):
        data = mutated(new_shard(seed, marker), mutate, seed)
        found, damage = scanned(data)
        theirs = webdataset_reads(data)
        assert found == theirs or damage, seed
        num_equal += found == theirs
    assert num_equal or mutate.__name__ in ("lying_size", "lying_pax")
    assert not marker.exists()


def test_the_reader_reads_a_healthy_shard_as_webdataset_does(marker: Path):
    for seed in range(12):
        shard = new_shard(seed, marker)
        assert scanned(shard.data) == (shard.samples(), [])
        assert webdataset_reads(shard.data) == shard.samples()


# --- through the index, the verifier and the stream


@pytest.fixture
def indexed(tmp_path: Path, marker: Path) -> Callable[[int], tuple[Shard, Index, Path]]:
    """Make a healthy shard, indexed with checksums; its file can then be damaged."""

    def make(seed: int) -> tuple[Shard, Index, Path]:
        shard = new_shard(seed, marker)
        file = tmp_path / f"{seed}" / "shards" / "s.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(shard.data)
        return shard, build_index(file.parent, out=tmp_path / f"{seed}", deep=True), file

    return make


def changed_samples(shard: Shard, data: bytes, suffixes: tuple[str, ...] | None = None) -> set[str]:
    return {
        part.key
        for part in shard.parts
        if (suffixes is None or part.suffix in suffixes)
        and data[(span := slice(part.offset, part.offset + part.num_bytes))] != shard.data[span]
    }


@each_kind
@pytest.mark.parametrize("count", COUNTS)
def test_verify_names_the_samples_with_changed_bytes_and_no_others(
    mutate: Mutate, count: int, indexed: Callable[[int], tuple[Shard, Index, Path]], marker: Path
):
    for seed in range(max(count // 2, 1)):
        shard, index, file = indexed(seed)
        data = mutated(shard, mutate, seed)
        file.write_bytes(data)
        report = verify_shards(index.path, shards=file.parent)
        if len(data) == len(shard.data):
            named = {bad.key for bad in report.bad_samples if bad.stage == "checksum"}
            assert named == changed_samples(shard, data), seed
            assert bool(report.problems) == (data != shard.data)
        else:
            assert "but was indexed with" in report.problems[0]
            with pytest.raises(UserError, match=r"s\.tar has \d+ bytes, not"):
                index.check_shards(file.parent)
    assert not marker.exists()


def streamed(index: Index, shards: Path, **settings: object) -> tuple[dict[str, bytes], set[str]]:
    """Key -> pixels of one epoch at weight 1, and the keys of the tombstones."""
    config = {"split": "all", "decode": ImageDecode(size=8), "lanes": 1} | settings
    data = DataConfig(path=str(index.path), shards=str(shards), **config)
    images: dict[str, bytes] = {}
    with open_stream(data, index=index, seed=1, batch_size=1, num_steps=index.num_samples) as got:
        for batch in got:
            if batch.weight[0] == 1:
                images[batch.keys[0]] = batch.x[0].numpy().tobytes()
        return images, {buried.key for buried in got.take_quarantined()}


@pytest.mark.fault
@each_kind
def test_the_stream_delivers_the_intact_samples_and_buries_the_others(
    mutate: Mutate,
    indexed: Callable[[int], tuple[Shard, Index, Path]],
    tmp_path: Path,
    marker: Path,
):
    for seed in range(2):
        shard, index, file = indexed(seed)
        healthy, none = streamed(index, file.parent)
        assert (set(healthy), none) == (set(shard.samples()), set())
        data = mutated(shard, mutate, seed)
        file.write_bytes(data)
        if len(data) == len(shard.data):  # else refused, as the test above shows
            images, buried = streamed(index, file.parent, verify_checksums=True)
            assert buried == changed_samples(shard, data, ("png",))
            assert images == {key: healthy[key] for key in healthy if key not in buried}
        found, _ = scanned(data)
        if found:
            again = build_index(file.parent, out=tmp_path / f"{seed}-again")
            images, buried = streamed(again, file.parent)
            assert set(images) | buried == set(found)
            for key in set(images) - (lost_in(shard, found) | {"../x"}):
                assert images[key] == healthy.get(key, images[key])
    assert not marker.exists()


def test_members_that_would_run_if_loaded_are_only_tombstones(
    indexed: Callable[[int], tuple[Shard, Index, Path]], marker: Path
):
    shard, index, file = indexed(0)
    Boom(marker)
    has = {key: set(members) for key, members in shard.samples().items()}
    for suffix in ("pickle", "pkl", "pyd", "npy"):
        images, buried = streamed(index, file.parent, decode=ImageDecode(size=8, suffixes=[suffix]))
        assert (images, buried) == ({}, set(has))
        assert any(suffix in suffixes for suffixes in has.values())
    arrays = ArrayDecode(shape=(1,), dtype="float32", range=(0, 1))
    images, buried = streamed(index, file.parent, decode=arrays)
    assert (images, buried) == ({}, set(has))
    assert not marker.exists()


def test_names_never_become_paths(
    indexed: Callable[[int], tuple[Shard, Index, Path]], tmp_path: Path, marker: Path
):
    def climbs(seed: int) -> bool:
        return any(key.startswith("../") for key in new_shard(seed, marker).samples())

    seed = next(filter(climbs, range(100)))
    indexed(seed)
    files = {p.relative_to(tmp_path / f"{seed}") for p in tmp_path.rglob("*") if p.is_file()}
    assert {file.as_posix() for file in files} == {
        "shards/s.tar",
        "index/manifest.json",
        "index/tables/s.tar.arrow",
    }


def many_claims(shard: Shard, count: int, size_of: Callable[[int], int]) -> bytes:
    """Nothing but headers, each with a claim on the bytes after it."""
    header = Data(shard.data[shard.parts[0].header : shard.parts[0].offset])
    claims = Data()
    for number in range(count):
        header[124:136] = b"%011o\0" % size_of(number)
        seal(header, 0)
        claims += header
    return bytes(claims) + b"x" * 4096


def test_many_claims_on_the_same_bytes_cost_nothing(marker: Path, tmp_path: Path):
    """Thousands of headers that all claim the rest of the file."""
    count = 3000
    data = many_claims(new_shard(0, marker), count, lambda number: (count - number) * BLOCK - 700)
    meter = Meter(data)
    visited: list[int] = []

    def visit(_name: str, _offset: int, num_bytes: int, _crc32: int) -> int:
        visited.append(num_bytes)
        return 0

    scan = TarScan(meter.read, len(data), visit)
    found = list(scan)
    assert sum(visited) <= 4 * len(data)
    assert meter.total <= 20 * len(data)
    assert len(scan.damage) + len(found) > 100
    (tmp_path / "s.tar").write_bytes(data)
    started = time.monotonic()
    build_index(tmp_path, deep=True)
    assert time.monotonic() - started < MAX_SECONDS


def test_a_shard_made_to_be_read_for_hours_is_an_error(marker: Path, tmp_path: Path):
    count = 30_000
    shares = np.random.default_rng(0).random(count)

    def size_of(number: int) -> int:
        return int(shares[number] * (count - number) / 2) * 2 * BLOCK

    gaps = Data(many_claims(new_shard(0, marker), count, size_of))
    for place in range(1, count, 2):  # where the claims end there is no header
        gaps[place * BLOCK : place * BLOCK + 8] = b"damaged!"
    (tmp_path / "s.tar").write_bytes(gaps)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"s\.tar would have to be read more than 8 times"):
        build_index(tmp_path, deep=True)
    assert time.monotonic() - started < 60


def test_giant_sizes_allocate_nothing(marker: Path):
    for seed in range(30):
        scanned(mutated(new_shard(seed % 3, marker), wild_size, seed))


def test_no_mutation_is_without_effect(marker: Path):
    """The fuzz would be worth nothing if its kinds changed nothing."""
    for mutate in KINDS:
        shards = [new_shard(seed, marker) for seed in range(6)]
        assert len(shards[0].samples()) == NUM_SAMPLES
        changed = [mutated(s, mutate, n) != s.data for n, s in enumerate(shards)]
        assert sum(changed) >= 3, mutate.__name__
