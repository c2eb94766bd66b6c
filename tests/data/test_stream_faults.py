"""The stream in trouble: bad samples keep their slot, bad shards are errors, nothing is left."""

import gc
import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.settings import DataConfig
from pipeline.data.storage import ShardReadError
from pipeline.data.stream import Stream
from tests.data.order_reference import Shape, SlowOrder
from tests.data.streams import (
    ARRAYS,
    IMAGES,
    SEED,
    SETTINGS,
    delivered,
    members_of,
    npy,
    source_array,
    write_shards,
)
from tests.processes import CPU_ENV, ROOT, open_files
from tests.shards import open_stream

COUNTS = (6, 9, 4, 6)  # 25 samples: a masked epoch of batches of 12 ends with 11 repeats
# One lane that reads one shard after the other, so that a test knows which is read last.
ONE_BY_ONE = {"split": "all", "lanes": 1, "interleave": 1, "window": 2}


@pytest.fixture
def index(tmp_path) -> Index:
    write_shards(tmp_path / "shards", COUNTS)
    return build_index(tmp_path / "shards")


def opened(index: Index, batch_size: int = 2, decode=IMAGES, **options) -> Stream:
    settings = {name: options.pop(name) for name in list(options) if name in ("threads", "shards")}
    data = DataConfig(path=str(index.path), decode=decode, **ONE_BY_ONE, **settings)
    return open_stream(data, index=index, seed=SEED, batch_size=batch_size, **options)


def last_shard(index: Index) -> tuple[Path, int]:
    """The shard that the first epoch reads last, and the first step that needs it."""
    slow = SlowOrder(Shape(COUNTS, SEED, G=2, L=1, K=1, S=2))
    shards = [slow.at(position)[1][0] for position in range(sum(COUNTS))]
    return index.path / index.shards[shards[-1]].name, shards.index(shards[-1]) // 2


def leftovers(index: Index) -> tuple[list[str], list[str]]:
    """Names of the streams' threads, and the shards that are open."""
    threads = [t.name for t in threading.enumerate() if t.name.startswith("stream-")]
    return threads, open_files(index.path)


NOTHING = ([], [])


# --- bad samples

CUT_SHORT = members_of(7)["png"][:-20]  # within the pixels
UNUSABLE_IMAGES = {
    3: ({"jpg": b"no image"}, "decode"),
    7: ({"png": CUT_SHORT}, "decode"),
    11: ({"webp": None, "txt": b"the image is missing"}, "member"),
    15: ({"jpg": b""}, "decode"),
}
TOO_LARGE = source_array(0) + np.eye(3, 4, dtype=np.float32) * 9
UNUSABLE_ARRAYS = {
    2: ({"npy": npy(TOO_LARGE)}, "range"),
    4: ({"npy": npy(np.full((3, 4), np.nan, np.float32))}, "range"),
    13: ({"npy": npy(source_array(13).T)}, "shape"),
    14: ({"npy": npy(source_array(14).astype(np.float64))}, "dtype"),
    20: ({"npy": None}, "member"),
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "decode, unusable", [(IMAGES, UNUSABLE_IMAGES), (ARRAYS, UNUSABLE_ARRAYS)], ids=["image", "npy"]
)
def test_a_bad_sample_keeps_its_slot_and_nobody_else_moves(
    tmp_path, index, decode, unusable, world
):
    damage = {number: members for number, (members, _) in unusable.items()}
    write_shards(tmp_path / "damaged", COUNTS, damage)
    damaged = build_index(tmp_path / "damaged")
    listed = []
    options = {"tail": "mask", "world": world, "decode": decode}
    clean = delivered(index, **options)
    slots = delivered(damaged, **options, quarantined=listed)

    size = len(clean[0].x)
    for slot, before in zip(slots, clean, strict=True):
        if slot.uid in unusable:
            assert slot.weight == 0
            assert slot.x == bytes(size)
            tensors = {"x": before.x, "corrupted": before.corrupted}
            assert slot._replace(weight=before.weight, **tensors) == before
        else:
            assert slot == before

    where = [index.shards[shard].name for shard, n in enumerate(COUNTS) for _ in range(n)]
    expected = [(n, f"{n:06d}", where[n], stage) for n, (_, stage) in unusable.items()]
    assert sorted(entry[:4] for entry in listed) == expected
    assert all(entry.reason for entry in listed)
    assert any(slot.uid in unusable and slot.weight == 0 for slot in clean), "no repeat is bad"


def test_a_bad_sample_is_listed_in_every_epoch_and_taken_once(tmp_path):
    write_shards(tmp_path / "s", (2, 2), {3: {"npy": None}})
    with opened(build_index(tmp_path / "s"), 4, decode=ARRAYS, num_steps=3) as stream:
        next(stream)
        assert [entry.uid for entry in stream.take_quarantined()] == [3]
        assert stream.take_quarantined() == []
        assert len(list(stream)) == 2
        assert [entry.uid for entry in stream.take_quarantined()] == [3, 3]
        assert (stream.counters.tombstones, stream.counters.images) == (3, 12)


def test_a_tombstone_leaves_no_trace_in_the_memory_that_is_used_again(tmp_path, index):
    """Every buffer has held tombstones and images in turn."""
    numbers = range(0, sum(COUNTS), 2)
    suffixes = {number: next(iter(members_of(number))) for number in numbers}
    damage = {number: {suffix: b""} for number, suffix in suffixes.items()}
    write_shards(tmp_path / "damaged", COUNTS, damage)
    clean = delivered(index, num_steps=12, prefetch=1)
    slots = delivered(build_index(tmp_path / "damaged"), num_steps=12, prefetch=1)
    for slot, before in zip(slots, clean, strict=True):
        is_bad = slot.uid in damage
        assert (slot.weight, slot.x) == ((0, bytes(len(slot.x))) if is_bad else (1, before.x))


def test_any_number_of_bad_samples_raises_nothing(tmp_path):
    """One process alone must not stop: the others would wait for it in a collective."""
    write_shards(tmp_path / "s", (30,), {n: {"npy": b"bad"} for n in range(30)})
    with opened(build_index(tmp_path / "s"), 30, decode=ARRAYS, num_steps=50) as stream:
        assert all(float(batch.weight.sum()) == 0 for batch in stream)
    assert stream.counters.tombstones == stream.counters.images == 1500


@pytest.mark.parametrize("text", [b"", b"cat", b"1.5", b"9" * 30, b"-" + b"9" * 30, b"9" * 9999])
def test_a_label_that_is_no_number_is_none(tmp_path, text):
    write_shards(tmp_path / "s", (2,), {1: {"cls": text}})
    slots = delivered(build_index(tmp_path / "s"), batch_size=6, num_steps=1)
    assert {slot.label for slot in slots if slot.uid == 1} == {-1}
    assert {slot.weight for slot in slots} == {1}


# --- bad shards


@pytest.mark.parametrize("how", ["missing", "longer", "shorter"])
def test_missing_or_changed_shards_are_user_errors_before_the_start(index, how):
    file = index.path / index.shards[2].name
    if how == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content + bytes(512) if how == "longer" else content[:-512])
    message = (
        "is missing: put it back.*data.shards"
        if how == "missing"
        else r"has \d+ bytes, not \d+.*latentmill index"
    )
    with pytest.raises(UserError, match=f"{file.name} {message}"):
        opened(index)
    assert leftovers(index) == NOTHING


@pytest.mark.parametrize(
    "change, message",
    [
        (Path.unlink, "is gone"),
        (lambda file: file.write_bytes(file.read_bytes()[:512]), r"ends at byte \d+, before \d+"),
    ],
    ids=["vanishes", "shrinks"],
)
def test_a_shard_that_changes_under_a_stream_is_an_error_and_no_tombstone(index, change, message):
    file, step = last_shard(index)
    assert step > 6, "the stream must not have read it at once"
    stream = opened(index)
    change(file)
    with pytest.raises(ShardReadError, match=rf"{file.name} {message}"):
        list(stream)
    assert stream.counters.batches <= step
    assert stream.counters.tombstones == 0
    assert leftovers(index) == NOTHING
    with pytest.raises(ShardReadError):  # again, rather than a quiet end
        next(stream)


def test_a_damaged_table_is_an_error_of_the_stream(index):
    for table in (index.path / "index" / "tables").iterdir():
        table.write_bytes(b"damaged")
    stream = opened(index)
    with pytest.raises(UserError, match="latentmill index"):
        next(stream)
    assert leftovers(index) == NOTHING


# --- threads and descriptors


@pytest.mark.parametrize("num_taken", [0, 1, 30])
def test_closing_ends_every_thread_and_closes_every_shard(index, num_taken):
    stream = opened(index, threads=5)
    for _ in range(num_taken):
        next(stream)
    assert leftovers(index) != NOTHING
    stream.close()
    assert leftovers(index) == NOTHING
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_the_last_batch_ends_every_thread(index):
    stream = opened(index, num_steps=3)
    assert len(list(stream)) == 3
    assert leftovers(index) == NOTHING


def test_a_dropped_stream_ends_its_threads(index):
    stream = opened(index)
    next(stream)
    del stream
    assert leftovers(index) == NOTHING


def test_a_stream_dropped_after_an_error_ends_its_threads(index):
    stream = opened(index)
    last_shard(index)[0].unlink()
    with pytest.raises(ShardReadError):
        list(stream)
    del stream
    gc.collect()
    assert leftovers(index) == NOTHING


DROPPED = threading.Event()


class Collecting(ImageDecode):
    """Runs the garbage collector in the decode threads, once the stream has been dropped."""

    def decode(self, data, out) -> None:
        DROPPED.wait(20)
        gc.collect()
        super().decode(data, out)


def test_a_stream_collected_in_its_own_thread_ends_all_the_same(index):
    gc.disable()
    try:
        stream = opened(index, decode=Collecting(size=24))
        ring = [stream]
        ring.append(ring)
        del stream, ring
        DROPPED.set()
        limit = time.monotonic() + 20
        while leftovers(index) != NOTHING and time.monotonic() < limit:
            time.sleep(0.01)
    finally:
        gc.enable()
    assert leftovers(index) == NOTHING


class Broken(ImageDecode):
    """A decoder with a bug: it raises something else than DecodeError."""

    def decode(self, data, out) -> None:
        out[0] = data[0] // 0


def test_a_bug_in_a_thread_is_raised_where_the_batch_is_wanted(index):
    stream = opened(index, decode=Broken(size=24), threads=3)
    with pytest.raises(ZeroDivisionError, match="by zero"):
        next(stream)
    assert leftovers(index) == NOTHING


def test_a_program_that_never_closes_its_stream_ends(index):
    config = {"path": str(index.path), **SETTINGS}
    code = f"""
        import json
        from pipeline.data.index import Index
        from pipeline.data.settings import DataConfig
        from tests.shards import open_stream
        data = DataConfig(**json.loads({json.dumps(config)!r}))
        stream = open_stream(data, index=Index.open(data.path), seed=1, batch_size=6)
        print(len(next(stream).keys))
    """
    argv = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    result = subprocess.run(
        argv, cwd=ROOT, env=CPU_ENV, capture_output=True, text=True, check=False, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "6\n", "")
