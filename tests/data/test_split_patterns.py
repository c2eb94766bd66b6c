"""A split may be a pattern of shard names: all samples of those shards, and no others."""

from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.data.index import Index, build_index
from pipeline.data.settings import DataConfig
from tests.shards import open_stream, write_tiny_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("patterns")
    write_tiny_shards(folder)
    for number in (1, 3):
        (folder / f"tiny-{number:04d}.tar").rename(folder / f"val-{number:04d}.tar")
    return build_index(folder)


def keys_of(index: Index, split: str) -> set[str]:
    data = DataConfig.model_validate(
        {"path": str(index.path), "split": split, "decode": {"kind": "image", "size": 32}}
    )
    with open_stream(data, index=index, seed=0, batch_size=4, tail="mask") as stream:
        return {
            key
            for batch in stream
            for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True)
            if weight
        }


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [
        ("val-*", [0, 0, 0, 24, 16]),
        ("val-{0001..0003}.tar", [0, 0, 0, 24, 16]),
        ("{tiny-0000,val-0003}.tar", [7, 0, 0, 0, 16]),
        ("*", [7, 1, 12, 24, 16]),
        ("tiny-*::val-0001.tar", [7, 1, 12, 24, 0]),
    ],
)
def test_the_samples_of_the_shards(index: Index, pattern: str, counts: list[int]):
    assert [shard.name[:4] for shard in index.shards] == ["tiny"] * 3 + ["val-"] * 2
    assert index.counts(pattern).tolist() == counts
    assert index.split_number(pattern) is None
    numbers = {0: range(7), 1: range(31, 32), 2: range(48, 60), 3: range(7, 31), 4: range(32, 48)}
    shards = [number for number, count in enumerate(counts) if count]
    assert keys_of(index, pattern) == {f"{n:06d}" for shard in shards for n in numbers[shard]}


def test_the_identity_is_that_of_the_shards_not_of_the_pattern(index: Index):
    assert index.split_identity("val-*") == index.split_identity("val-{0001..0003}.tar")
    others = ("tiny-*", "*", "all", "train", "held_out", "val-*")
    assert len({index.split_identity(split) for split in others}) == len(others)


def test_members_are_looked_for_in_the_shards_of_the_pattern(index: Index):
    index.check_suffixes(["png"], 0.0, split="val-*")
    with pytest.raises(UserError, match="No sample of .* has a member with a suffix of webp"):
        index.check_suffixes(["webp"], split="val-*")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("valid-*", "data.split = 'valid-*' matches none of the 5 shards of {path}, such as tiny-"),
        ("val-{7..9}.tar", "matches none of the 5 shards"),
        ("val", "data.split = 'val': the index has the splits held_out, train, all"),
        ("val-{1..", "cannot be expanded"),
    ],
)
def test_a_pattern_without_a_shard(index: Index, pattern: str, message: str):
    with pytest.raises(UserError) as refused:
        index.counts(pattern)
    assert message.replace("{path}", str(Path(str(index.path)))) in str(refused.value)
