"""The stream: the order's samples, bit for bit, whatever the processes, threads and restarts."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.data.decode import ArrayDecode, ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.order.mixture import read_amplification
from pipeline.data.settings import DataConfig
from pipeline.data.stream import Stream
from tests.data.order_reference import Shape, SlowOrder
from tests.data.streams import (
    ARRAYS,
    IMAGES,
    SEED,
    SETTINGS,
    delivered,
    label_of,
    members_of,
    npy,
    slow_slots,
    source_array,
    source_image,
    write_shards,
)
from tests.shards import open_stream

COUNTS = (9, 0, 14, 1, 5, 20)  # 49 samples: four batches of 12 and one over
SPLIT = SplitSpec(fractions={"train": 0.6, "held_out": 0.4})
NUM_STEPS = 10  # more than two epochs


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("stream") / "shards"
    write_shards(folder, COUNTS)
    return build_index(folder, split=SPLIT)


@pytest.fixture(scope="module")
def baseline(index):
    """One process, one thread of each kind."""
    return delivered(index, num_steps=NUM_STEPS, threads=1, read_threads=1)


def shape_of(counts=COUNTS, tail="carry") -> Shape:
    lanes, interleave, window = (SETTINGS[name] for name in ("lanes", "interleave", "window"))
    return Shape(tuple(counts), SEED, G=12, L=lanes, K=interleave, S=window, tail=tail)


def numbers_per_shard(split=None) -> list[list[int]]:
    """Sample numbers, which are also uids and keys; of one split by its own rule."""
    ends = list(itertools.accumulate(COUNTS, initial=0))
    return [
        [n for n in range(*ends[i : i + 2]) if split in (None, split_of(n))]
        for i in range(len(COUNTS))
    ]


def split_of(number: int) -> str:
    return SPLIT.names[SPLIT.number_of(f"{number:06d}")]


def decoded(number: int, decode) -> bytes:
    """The bytes of a slot, from the sample's own file."""
    out = np.zeros(decode.buffer_shape, decode.stored_dtype)
    members = members_of(number)
    suffix = next(name for name in members if name in decode.member_suffixes)
    decode.decode(members[suffix], out)
    return (out.transpose(2, 0, 1) if decode.kind == "image" else out).tobytes()


def without_tensors(slots):
    return [(s.step, s.slot, s.uid, s.epoch, s.weight) for s in slots]


def test_the_stream_delivers_the_order_with_the_samples_own_content(baseline):
    expected = slow_slots(numbers_per_shard(), shape_of(), NUM_STEPS)
    assert without_tensors(baseline) == expected
    for slot in baseline:
        assert slot.key == f"{slot.uid:06d}"
        assert slot.label == label_of(slot.uid)
        assert slot.x == decoded(slot.uid, IMAGES)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_threads_and_micro_batches_change_no_bit(index, baseline, world, threads):
    settings = {"threads": threads, "read_threads": threads, "prefetch": threads}
    for parts in (1, 3):
        slots = delivered(index, num_steps=NUM_STEPS, world=world, parts=parts, **settings)
        assert slots == baseline


def test_every_epoch_corrupts_a_sample_anew(baseline):
    by_uid = {slot.uid: slot for slot in baseline if slot.epoch == 0}
    again = [slot for slot in baseline if slot.epoch == 1]
    assert all(slot.x == by_uid[slot.uid].x for slot in again)
    assert all(slot.corrupted != by_uid[slot.uid].corrupted for slot in again)
    assert len({slot.noise_key for slot in baseline}) == len(baseline)


@pytest.mark.parametrize("first_step", range(1, NUM_STEPS + 1))
def test_a_restart_at_any_step_gives_the_rest(index, baseline, first_step):
    rest = NUM_STEPS - first_step
    slots = delivered(index, first_step=first_step, num_steps=rest, world=2)
    assert slots == [slot for slot in baseline if slot.step >= first_step]


def test_batches_cross_epochs_and_each_sample_comes_once_per_epoch(baseline):
    seen = Counter((slot.epoch, slot.uid) for slot in baseline)
    complete = NUM_STEPS * 12 // sum(COUNTS)
    assert all(seen[epoch, uid] == 1 for epoch in range(complete) for uid in range(sum(COUNTS)))
    assert set(seen.values()) == {1}
    assert len({slot.epoch for slot in baseline if slot.step == 4}) == 2


@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_masked_epoch_ends_with_repeats_that_do_not_count(index, world):
    slots = delivered(index, world=world, tail="mask")
    expected = slow_slots(numbers_per_shard(), shape_of(tail="mask"), 5)
    assert without_tensors(slots) == expected
    counted = Counter(slot.uid for slot in slots if slot.weight == 1)
    assert counted == dict.fromkeys(range(sum(COUNTS)), 1)
    assert [slot.weight for slot in slots].count(0) == 5 * 12 - sum(COUNTS)
    second = delivered(index, world=world, tail="mask", first_step=3)
    assert second == [slot for slot in slots if slot.step >= 3]


@pytest.mark.parametrize("split", SPLIT.names)
def test_a_split_is_a_data_set_of_its_own(index, split):
    rows = numbers_per_shard(split)
    shape = shape_of(counts=[len(numbers) for numbers in rows])
    slots = delivered(index, split=split, num_steps=6, world=2)
    assert without_tensors(slots) == slow_slots(rows, shape, 6)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_three_formats_arrive_as_they_were_stored(index, channels):
    decode = ImageDecode(size=24, channels=channels)
    num_exact = 0
    for slot in delivered(index, tail="mask", decode=decode):
        pixels = Image.fromarray(source_image(slot.uid)).convert("RGB" if channels == 3 else "L")
        arrived = np.frombuffer(slot.x, np.uint8).reshape(channels, 24, 24).transpose(1, 2, 0)
        if pixels.size == (24, 24):
            expected = np.asarray(pixels).reshape(24, 24, channels).astype(int)
            is_exact = "jpg" not in members_of(slot.uid)
            assert np.abs(arrived - expected).mean() <= (0 if is_exact else 4)
            num_exact += is_exact
    assert num_exact >= 20


def test_arrays_arrive_exactly_on_any_number_of_processes(index):
    one, four = (
        delivered(index, num_steps=6, world=world, threads=world, decode=ARRAYS) for world in (1, 4)
    )
    assert one == four
    assert all(slot.x == source_array(slot.uid).tobytes() for slot in one)


def test_images_lie_in_channels_last_memory(index):
    data = DataConfig(path=str(index.path), decode=IMAGES, **SETTINGS)
    with open_stream(data, index=index, seed=SEED, batch_size=12, num_steps=1) as stream:
        batch = next(stream)
    assert batch.x.shape == (12, 3, 24, 24)
    assert batch.x.stride() == (24 * 24 * 3, 1, 24 * 3, 3)


@pytest.mark.parametrize("number", range(8))
def test_any_shape_gives_its_order(tmp_path, number):
    """Empty shards, fewer samples than lanes, batches of several epochs, windows of one sample."""
    rng = np.random.default_rng(number)
    counts = rng.integers(0, [3, 9][number % 2], rng.integers(1, 7))
    counts[-1] += counts.sum() == 0
    write_shards(tmp_path / "s", counts.tolist())
    index = build_index(tmp_path / "s")
    ends = np.cumsum([0, *counts]).tolist()
    rows = [list(range(*ends[i : i + 2])) for i in range(len(counts))]
    for _ in range(6):
        lanes, share = int(rng.choice([1, 2, 3, 6, 12])), int(rng.integers(1, 4))
        world = int(rng.choice([w for w in range(1, 7) if lanes * share % w == 0]))
        interleave, window = int(rng.integers(1, 5)), int(rng.choice([1, 2, 5, 64]))
        tail = str(rng.choice(["carry", "mask"]))
        size = lanes * share
        num_steps = 8 if tail == "carry" else -(-ends[-1] // size)
        slots = delivered(
            index,
            batch_size=size,
            num_steps=num_steps,
            world=world,
            tail=tail,
            decode=ARRAYS,
            lanes=lanes,
            interleave=interleave,
            window=window,
        )
        shape = Shape(tuple(counts.tolist()), SEED, size, lanes, interleave, window, tail)
        assert without_tensors(slots) == slow_slots(rows, shape, num_steps), (shape, world)


def opened(index: Index, **options) -> Stream:
    data = DataConfig(path=str(index.path), decode=IMAGES, **SETTINGS)
    return open_stream(data, **({"index": index, "seed": SEED, "batch_size": 12} | options))


def test_numbers_that_do_not_fit_are_user_errors(index):
    with pytest.raises(
        UserError, match=r"batch of 12 does not divide over 5 processes: .*10 or 15"
    ):
        opened(index, world=5)
    with pytest.raises(UserError, match=r"data.lanes = 6 does not divide the global batch of 20"):
        opened(index, batch_size=20)


def test_no_steps_are_no_batches(index):
    with opened(index, num_steps=0) as stream:
        assert list(stream) == []


def test_counters_tell_what_was_delivered_and_spent(index):
    started = time.perf_counter()
    with opened(index, tail="mask") as stream:
        assert len(list(stream)) == 5
        counters = stream.counters
    assert (counters.batches, counters.images, counters.tombstones) == (5, 60, 0)
    assert 0 < counters.stall_seconds <= time.perf_counter() - started
    wanted = sum(
        len(data)
        for number in range(sum(COUNTS))
        for suffix, data in members_of(number).items()
        if suffix != "npy"
    )
    files = sum(shard.bytes for shard in index.shards)
    # Every wanted byte once, and the repeats of the last batch; gaps are read with them.
    assert wanted <= counters.bytes_read <= 2 * files
    # One long read per lane, window and shard; the repeats are a visit of their own.
    slow, visits = SlowOrder(shape_of(tail="mask")), set()
    for position in range(60):
        lap, place = divmod(position, sum(COUNTS))
        shard = slow.at(position)[1][0]
        visits.add((lap, place % 6, place // 6 // SETTINGS["window"], shard))
    assert counters.reads == len(visits)


def test_a_stream_that_ends_reads_no_sample_behind_its_end(tmp_path):
    large = npy(np.zeros((100, 100), np.float32))  # more than a gap that is read over
    write_shards(tmp_path / "s", (8,), {number: {"npy": large} for number in range(8)})
    decode = ArrayDecode(shape=(100, 100), range=(0.0, 1.0))
    data = DataConfig(path=str(tmp_path / "s"), split="all", decode=decode, window=8)
    index = build_index(tmp_path / "s")
    with open_stream(data, index=index, seed=SEED, batch_size=1, num_steps=2) as stream:
        assert len(list(stream)) == 2
    assert 2 * len(large) <= stream.counters.bytes_read < 3 * len(large)


def test_a_slow_consumer_finds_its_batches_ready(index):
    with opened(index, num_steps=4) as stream:
        for _ in range(4):
            time.sleep(0.3)  # far longer than twelve small images take
            next(stream)
        assert stream.counters.stall_seconds < 0.6  # half of what the consumer slept


@pytest.mark.parametrize("lanes, share, world", [(6, 2, 4), (6, 2, 3), (5, 4, 4), (64, 1, 8)])
def test_read_amplification_counts_the_lanes_that_ranks_touch(lanes, share, world, tmp_path):
    slots = lanes * share // world
    touched = [
        len({slot // share for slot in range(rank * slots, (rank + 1) * slots)})
        for rank in range(world)
    ]
    assert read_amplification(lanes, world) == sum(touched) / lanes


def test_a_wasteful_number_of_lanes_is_warned_of_once(index, caplog):
    for rank in range(4):
        opened(index, rank=rank, world=4).close()
    (record,) = caplog.records
    assert "data.lanes = 6 over 4 processes reads every byte 1.33 times" in record.getMessage()
