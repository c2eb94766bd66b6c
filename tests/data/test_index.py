"""Storage, splits and the index: complete, reproducible, resumable, and honest about damage."""

import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from pipeline.common.errors import UserError
from pipeline.data.index import Index, build_index, scan
from pipeline.data.index.manifest import table_path
from pipeline.data.index.splits import SplitSpec, group_of
from pipeline.data.storage import ShardReadError, open_storage
from pipeline.data.storage.patterns import find_shards
from tests.processes import open_files
from tests.shards import TINY_COUNTS, write_tiny_shards


@pytest.fixture
def shards(tmp_path) -> Path:
    write_tiny_shards(tmp_path / "shards")
    return tmp_path / "shards"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- storage


def test_directory_glob_and_braces_find_the_same_shards(shards):
    names = tuple(f"tiny-{i:04d}.tar" for i in range(len(TINY_COUNTS)))
    for pattern in (shards, shards / "*.tar", shards / "tiny-{0000..0004}.tar"):
        found = find_shards(pattern)
        assert (found.root, found.names) == (str(shards), names)
    nested = find_shards(shards.parent / "**" / "*.tar")
    assert (nested.root, nested.names) == (str(shards), names)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("", "no .tar shard"),
        ("nothing", "no .tar shard|there is no shard"),
        ("tiny-{0003..0007}.tar", "there is no shard .*tiny-0005"),
    ],
)
def test_missing_shards_are_named(shards, pattern, message):
    empty = shards.parent / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=message):
        find_shards(shards / pattern if pattern else empty)


def test_storage_reads_ranges_and_bounds_its_descriptors(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.tar").write_bytes(bytes(range(100)))
    storage = open_storage(tmp_path)
    storage._max_open = 5
    for i in [*range(40), *range(40)]:
        assert storage.read(f"{i}.tar", 10, 5) == bytes(range(10, 15))
    assert 1 <= len(open_files(tmp_path)) <= 5
    storage.close()
    assert open_files(tmp_path) == []
    with pytest.raises(ShardReadError, match="ends at byte 100, before 120"):
        storage.read("0.tar", 90, 30)
    with pytest.raises(ShardReadError, match="is gone"):
        storage.read("40.tar", 0, 1)
    storage.close()


# --- splits


def test_fractions_are_met_and_growth_moves_nobody():
    spec = SplitSpec(fractions={"train": 0.7, "held_out": 0.2, "test": 0.1})
    numbers = [spec.number_of(f"key-{i}") for i in range(20_000)]
    shares = Counter(spec.names[number] for number in numbers)
    for name, fraction in spec.fractions.items():
        assert shares[name] / 20_000 == pytest.approx(fraction, abs=0.015)
    assert numbers[:100] == [spec.number_of(f"key-{i}") for i in range(100)]
    other = SplitSpec(fractions=spec.fractions, seed=1)
    assert numbers != [other.number_of(f"key-{i}") for i in range(20_000)]


def test_the_order_the_fractions_are_written_in_does_not_matter():
    one = SplitSpec(fractions={"a": 0.25, "b": 0.75})
    two = SplitSpec(fractions={"b": 0.75, "a": 0.25})
    assert one.digest() == two.digest()
    assert all(one.number_of(str(i)) == two.number_of(str(i)) for i in range(100))


@pytest.mark.parametrize(
    "settings",
    [
        {"fractions": {"train": 0.9}},
        {"fractions": {"all": 1.0}},
        {"fractions": {"Train": 1.0}},
        {"fractions": {"a": 1.5, "b": -0.5}},
        {"fractions": {}},
        {"by": "label"},
    ],
)
def test_impossible_splits_are_refused(settings):
    with pytest.raises(UserError, match="SplitSpec has"):
        SplitSpec(**settings)


def test_groups_come_from_nested_fields_of_any_type():
    metadata = json.dumps({"a": {"b": "x"}, "n": 3}).encode()
    assert group_of(metadata, "a.b", "here") == "x"
    assert group_of(metadata, "n", "here") == "3"
    for broken in (b"{}", b"no json", b'{"a": 1}'):
        with pytest.raises(UserError, match="shard 5: the JSON member has no field 'a.b'"):
            group_of(broken, "a.b", "shard 5")


# --- index


def test_index_holds_every_sample_of_every_shard(shards):
    index = build_index(shards, split=SplitSpec(fractions={"train": 0.5, "held_out": 0.5}))
    assert [shard.samples for shard in index.shards] == list(TINY_COUNTS)
    assert index.num_samples == sum(TINY_COUNTS)
    assert index.first_uids.tolist() == [0, *np.cumsum(TINY_COUNTS)[:-1]]
    assert (index.counts("train") + index.counts("held_out") == index.counts("all")).all()
    assert 0 < index.counts("train").sum() < index.num_samples
    assert index.damage == []
    assert index.num_duplicate_keys == 0
    number = 0
    for shard, entry in enumerate(index.shards):
        data = (shards / entry.name).read_bytes()
        table = index.table(shard)
        train, held_out = table.rows_of(0), table.rows_of(1)
        assert sorted([*train, *held_out]) == list(range(entry.samples))
        assert len(held_out) == index.counts("train")[shard]  # alphabetical: held_out is 0
        for row, key in enumerate(table.keys()):
            assert key == f"{number:06d}"
            members = table.members(row)
            assert set(members) == {"png", "cls", "json"}
            offset, size = members["json"]
            assert json.loads(data[offset : offset + size])["number"] == number
            assert data[members["png"][0] :].startswith(b"\x89PNG")
            number += 1
    again = Index.open(shards)
    assert again.dataset_id == index.dataset_id
    assert again.shards == index.shards


def test_wanted_members_follow_the_order_of_the_suffixes(tmp_path):
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "0", "jpg": b"j0", "png": b"p0"})
        tar.write({"__key__": "1", "png": b"p1"})
        tar.write({"__key__": "2", "txt": b"t2"})
    table = build_index(tmp_path).table(0)
    data = (tmp_path / "a.tar").read_bytes()

    def contents(*suffixes):
        ranges = table.ranges_of(suffixes)
        bounds = zip(ranges.offset.tolist(), ranges.num_bytes.tolist(), strict=True)
        return [data[offset : offset + size] if offset >= 0 else None for offset, size in bounds]

    assert contents("png", "jpg") == [b"p0", b"p1", None]
    assert contents("jpg", "png") == [b"j0", b"p1", None]
    assert contents("txt") == [None, None, b"t2"]
    assert contents("webp") == [None, None, None]
    assert table.suffix_counts() == {"jpg": 1, "png": 2, "txt": 1}


@pytest.mark.slow
def test_the_same_shards_give_the_same_bytes(shards, monkeypatch):
    build_index(shards, out=shards.parent / "one", workers=1)
    monkeypatch.setattr("pipeline.data.index.build.PARALLEL_FROM_BYTES", 0)
    build_index(shards, out=shards.parent / "two", workers=2)
    for path in shards.glob("*.tar"):
        os.utime(path, (1, 1))
    build_index(shards, out=shards.parent / "three", workers=1)
    one = files_of(shards.parent / "one")
    assert len(one) == len(TINY_COUNTS) + 1
    assert one == files_of(shards.parent / "two") == files_of(shards.parent / "three")


def test_only_changed_shards_are_read_again(shards, monkeypatch):
    build_index(shards)
    before = files_of(shards / "index")
    scanned = []
    write = scan._write
    monkeypatch.setattr(scan, "_write", lambda *a: (scanned.append(a[0].name), write(*a)))
    assert build_index(shards).dataset_id
    assert scanned == []
    assert files_of(shards / "index") == before

    changed = shards / "tiny-0002.tar"
    other = shards.parent / "other"
    write_tiny_shards(other, counts=(3,))
    shutil.copy(other / "tiny-0000.tar", changed)
    table_path(shards, "tiny-0004.tar").write_bytes(b"damaged")
    index = build_index(shards)
    assert scanned == ["tiny-0002.tar", "tiny-0004.tar"]
    assert index.shards[2].samples == 3
    assert index.num_duplicate_keys == 3
    assert index.duplicate_keys[0] == ["000000", "tiny-0000.tar", "tiny-0002.tar"]


def test_another_split_reuses_what_was_read(shards, monkeypatch):
    first = build_index(shards)
    whole = files_of(shards / "index")
    monkeypatch.setattr(scan, "_write", lambda *_: pytest.fail("a shard was read again"))
    split = SplitSpec(by="json.group", fractions={"train": 0.5, "held_out": 0.5})
    second = build_index(shards, split=split)
    assert second.dataset_id == first.dataset_id
    assert second.split_identity("train") != first.split_identity("train")
    assert second.split_identity("all") == first.split_identity("all") == "all"
    groups = {0: set(), 1: set()}
    number = 0
    for shard, entry in enumerate(second.shards):
        for split_number in second.table(shard).split_numbers[: entry.samples].tolist():
            groups[split_number].add(number // 4)
            number += 1
    assert groups[0].isdisjoint(groups[1])
    build_index(shards)
    assert files_of(shards / "index") == whole


def test_a_stopped_build_goes_on_and_leaves_the_same_index(shards, monkeypatch):
    build_index(shards, out=shards.parent / "whole")
    out = shards.parent / "stopped"
    describe = scan._describe

    def stop_at_third(task, *rest):
        if task.name == "tiny-0002.tar":
            raise KeyboardInterrupt
        return describe(task, *rest)

    monkeypatch.setattr(scan, "_describe", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build_index(shards, out=out)
    with pytest.raises(UserError, match="does not exist: run `latentmill index"):
        Index.open(out)
    monkeypatch.setattr(scan, "_describe", describe)
    (out / "index" / "tables" / "tiny-0003.tar.arrow.tmp-123").write_bytes(b"litter")
    build_index(shards, out=out)
    assert files_of(out) == files_of(shards.parent / "whole")


def test_an_index_stopped_between_two_splits_is_not_mixed_up(shards):
    build_index(shards)
    manifest = (shards / "index" / "manifest.json").read_bytes()
    build_index(shards, split=SplitSpec(seed=5))
    (shards / "index" / "manifest.json").write_bytes(manifest)
    with pytest.raises(UserError, match="stopped half-way"):
        Index.open(shards).table(0)


def test_damage_is_reported_and_does_not_stop_the_index(shards):
    path = shards / "tiny-0001.tar"
    with tarfile.open(path) as tar:
        headers = {member.name: member.offset for member in tar}
    first = TINY_COUNTS[0]
    data = bytearray(path.read_bytes())
    data[headers[f"{first + 5:06d}.png"]] ^= 1  # the sixth sample loses its image
    thirteenth = [at for name, at in headers.items() if name.startswith(f"{first + 12:06d}.")]
    path.write_bytes(data[: min(thirteenth)])  # the file ends with the twelfth sample
    index = build_index(shards)
    assert [(name, damage.kind) for name, damage in index.damage] == [
        ("tiny-0001.tar", "bad_header"),
        ("tiny-0001.tar", "no_end_marker"),
    ]
    assert index.shards[1].samples == 12
    assert [row for row in range(12) if "png" not in index.table(1).members(row)] == [5]


def test_stale_shards_are_named_with_the_remedy(shards):
    index = build_index(shards)
    index.check_shards(shards)
    with (shards / "tiny-0003.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"tiny-0003.tar has \d+ bytes, not .*latentmill index"):
        index.check_shards(shards)
    (shards / "tiny-0001.tar").unlink()
    with pytest.raises(UserError, match="tiny-0001.tar is missing"):
        index.check_shards(shards)


def test_shards_that_are_gone_leave_the_index(shards):
    build_index(shards)
    (shards / "tiny-0001.tar").unlink()
    assert len(build_index(shards).shards) == len(TINY_COUNTS) - 1
    assert not table_path(shards, "tiny-0001.tar").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 99}'])
def test_foreign_manifests_are_user_errors(tmp_path, content):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest.json"):
        Index.open(tmp_path)


def test_unknown_splits_are_listed(shards):
    with pytest.raises(UserError, match="'valid'.*splits held_out, train, all"):
        build_index(shards).counts("valid")


def test_a_missing_field_names_shard_and_sample(shards):
    with pytest.raises(UserError, match="tiny-0000.tar, sample '000000'.*no field 'patient'"):
        build_index(shards, split=SplitSpec(by="json.patient"))


def test_an_output_that_cannot_be_written_is_a_user_error(shards):
    (shards.parent / "file").write_bytes(b"")
    with pytest.raises(UserError, match="--out"):
        build_index(shards, out=shards.parent / "file" / "x")


def test_empty_shards_are_indexed(tmp_path):
    write_tiny_shards(tmp_path, counts=(0, 3, 0))
    index = build_index(tmp_path)
    assert index.counts("all").tolist() == [0, 3, 0]
    assert index.table(0).keys() == []
    assert index.table(0).ranges_of(("png",)).offset.tolist() == []
