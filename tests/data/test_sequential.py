"""Rows of a shard for the export: each once, in order, and bad rows apart from bad shards."""

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.common.texts import to_bytes
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.sequential import RowBatch, read_shards
from pipeline.data.settings import DataConfig
from pipeline.data.storage import ShardReadError
from tests.data.streams import ARRAYS, IMAGES, label_of, npy, source_array, write_shards

COUNTS = (5, 0, 23, 1)
FIRST = (0, 5, 5, 28)  # number of each shard's first sample
SPLIT = SplitSpec(fractions={"train": 0.6, "held_out": 0.4})
METADATA = {
    6: b'{"name": "six"}',
    7: '{"name": "späť"}'.encode(),
    8: b"\xff is no UTF-8",
    28: b"{}",
}
UNUSABLE = {
    9: ({"npy": None, "txt": b""}, "member"),
    14: ({"npy": npy(source_array(14))[:90]}, "decode"),
    27: ({"npy": npy(source_array(27) * np.float32(np.nan))}, "range"),
}


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("rows") / "shards"
    damage = {number: {"json": text} for number, text in METADATA.items()}
    damage |= {number: members for number, (members, _) in UNUSABLE.items()}
    write_shards(folder, COUNTS, damage)
    return build_index(folder, split=SPLIT)


def batches(index, shard=2, size=4, split="all", decode=ARRAYS, threads=2) -> list[RowBatch]:
    data = DataConfig(path=str(index.path), split=split, decode=decode, threads=threads)
    with closing(read_shards(data, index, [shard], size)) as shards:
        return [batch for _, rows in shards for batch in rows]


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("rows-")]


@pytest.mark.parametrize("size", [1, 4, 23, 50])
@pytest.mark.parametrize("split", ["all", *SPLIT.names])
def test_every_row_of_a_split_comes_once_in_the_order_of_the_shard(index, split, size):
    for shard, count in enumerate(COUNTS):
        numbers = [
            number
            for number in range(FIRST[shard], FIRST[shard] + count)
            if split in ("all", SPLIT.names[SPLIT.number_of(f"{number:06d}")])
        ]
        found = batches(index, shard, size, split)
        assert [batch.num_rows for batch in found] == [
            len(numbers[at : at + size]) for at in range(0, len(numbers), size)
        ]
        keys = [key for batch in found for key in batch.keys]
        rows = [row for batch in found for row in batch.rows.tolist()]
        labels = [label for batch in found for label in batch.labels.tolist()]
        metadata = [text for batch in found for text in batch.metadata]
        assert keys == [f"{number:06d}" for number in numbers]
        assert rows == [number - FIRST[shard] for number in numbers]
        assert labels == [label_of(number) for number in numbers]
        assert as_bytes(metadata) == [METADATA.get(number) for number in numbers]


def as_bytes(texts: list[str | None]) -> list[bytes | None]:
    return [None if text is None else to_bytes(text) for text in texts]


def test_texts_pass_through_byte_for_byte(tmp_path):
    texts = {1: "späte Blüte".encode(), 3: b"\xff", 4: b"", 5: b"a\\xff\0"}
    write_shards(tmp_path / "s", (6,), {number: {"txt": text} for number, text in texts.items()})
    found = batches(build_index(tmp_path / "s"), shard=0)
    contents = as_bytes([text for batch in found for text in batch.texts])
    assert contents == [texts.get(number) for number in range(6)]
    assert all(text is None for batch in found for text in batch.metadata)


def test_labels_that_no_number_holds_come_as_texts(tmp_path):
    """Of others nothing is read."""
    labels = {0: b"cat", 1: b"3.0", 2: b"7", 3: b" -1\n", 4: b"caf\xe9", 5: b"", 6: None}
    write_shards(tmp_path / "s", (7,), {number: {"cls": text} for number, text in labels.items()})
    found = batches(build_index(tmp_path / "s"), shard=0)
    assert [label for batch in found for label in batch.labels] == [-1, -1, 7, -1, -1, -1, -1]
    texts = {
        4 * number + place: to_bytes(text)
        for number, batch in enumerate(found)
        for place, text in batch.label_texts.items()
    }
    assert texts == {number: text for number, text in labels.items() if number not in (2, 6)}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_contents_are_exact_and_padded_with_zeros(index, threads):
    for batch in batches(index, size=10, threads=threads):
        assert batch.x.shape == (10, 3, 4)
        for place, key in enumerate(batch.keys):
            expected = 0 * source_array(0) if int(key) in UNUSABLE else source_array(int(key))
            assert torch.equal(batch.x[place], torch.from_numpy(expected))
        assert not batch.x[batch.num_rows :].any()


def test_bad_rows_are_marked_with_their_reason_and_stay_in_place(index):
    found = batches(index)
    valid = np.concatenate([batch.valid for batch in found]).tolist()
    assert valid == [number not in UNUSABLE for number in range(5, 28)]
    faults = [fault for batch in found for fault in batch.faults]
    assert [fault[:3] for fault in faults] == [
        (number - 5, f"{number:06d}", stage) for number, (_, stage) in UNUSABLE.items()
    ]
    assert all(fault.reason for fault in faults)


def test_images_come_channels_last_whatever_the_threads(index):
    one, five = (batches(index, decode=IMAGES, threads=threads) for threads in (1, 5))
    for batch, other in zip(one, five, strict=True):
        assert batch.x.shape == (4, 3, 24, 24)
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.x, other.x)
        assert batch.valid.all()


@pytest.fixture
def own_index(tmp_path) -> Index:
    write_shards(tmp_path / "s", COUNTS)
    return build_index(tmp_path / "s")


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-512])],
    ids=["missing", "changed"],
)
def test_a_missing_or_changed_shard_is_an_error_and_no_invalid_row(own_index, damage):
    damage(own_index.path / own_index.shards[2].name)
    with pytest.raises(ShardReadError, match=r"s-002.tar is missing or has changed"):
        batches(own_index)
    assert sum(batch.num_rows for batch in batches(own_index, shard=0)) == COUNTS[0]


def test_a_shard_that_shrinks_while_it_is_read_is_an_error_and_no_invalid_row(own_index):
    data = DataConfig(path=str(own_index.path), split="all", decode=ARRAYS)
    shards = read_shards(data, own_index, [2], 1)
    _, reading = next(shards)
    assert next(reading).valid.all()
    file = own_index.path / own_index.shards[2].name
    file.write_bytes(file.read_bytes()[:1024])
    with pytest.raises(ShardReadError, match=r"s-002.tar ends at byte"):
        assert all(batch.valid.all() for batch in reading)
    shards.close()
    assert reading_threads() == []


def test_an_unknown_split_is_a_user_error(own_index):
    with pytest.raises(UserError, match="'valid'"):
        batches(own_index, split="valid")


def test_reading_that_is_given_up_leaves_no_thread(own_index):
    data = DataConfig(path=str(own_index.path), split="all", decode=ARRAYS)
    reading = read_shards(data, own_index, [2, 0], 1)
    next(next(reading)[1])
    assert reading_threads() != []
    reading.close()
    assert reading_threads() == []


def test_a_bad_shard_ends_alone_and_the_next_goes_on(own_index):
    data = DataConfig(path=str(own_index.path), split="all", decode=ARRAYS)
    (own_index.path / own_index.shards[0].name).unlink()
    found = []
    for shard, rows in read_shards(data, own_index, [2, 0, 3, 2], 4):
        try:
            found.append((shard, sum(batch.num_rows for batch in rows)))
        except ShardReadError:
            found.append((shard, None))
    assert found == [(2, 23), (0, None), (3, 1), (2, 23)]
    assert reading_threads() == []


def test_what_is_left_of_a_shard_is_not_read_and_the_next_is_asked_for_late(own_index):
    data = DataConfig(path=str(own_index.path), split="all", decode=ARRAYS)
    asked = []

    def shards():
        for shard in (2, 1, 3, 0):  # 1 has no rows
            asked.append(shard)
            yield shard

    reading = read_shards(data, own_index, shards(), 1)
    shard, rows = next(reading)
    assert (shard, next(rows).keys, asked) == (2, ["000005"], [2, 1])
    shard, rows = next(reading)
    assert (shard, len(list(rows))) == (3, 1)
    reading.close()
