"""Shards against their index: nothing is wrong until something is, and then it is named."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.data.index import Index, build_index
from pipeline.data.index.manifest import has_index
from pipeline.data.index.table import ShardTable, write_table
from pipeline.data.index.tar import TarSample
from pipeline.data.index.verify import verify_shards
from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources import Sprites
from tests.data.streams import members_of, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pack(Sprites(count=12, shard_samples=5), tmp_path / "s")
    return tmp_path / "s"


def first_shard(shards: Path) -> Path:
    return sorted(shards.glob("*.tar"))[0]


def test_untouched_shards_have_no_problem(shards: Path):
    lines: list[str] = []
    report = verify_shards(shards, progress=lambda line, _: lines.append(line))
    assert report.problems == []
    assert (report.num_shards, report.num_samples) == (3, 12)
    assert report.num_bytes == sum(file.stat().st_size for file in shards.glob("*.tar"))
    assert lines[0].startswith("verify: 1 of 3 shards (")
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("verify: 3 of 3 shards (100 %), ")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[600] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "has another content than was indexed"),
        (lambda file: file.write_bytes(file.read_bytes()[:-512]), "but was indexed with"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_changed_shard_is_named(shards: Path, damage: Callable[[Path], object], message: str):
    file = first_shard(shards)
    damage(file)
    problem = verify_shards(shards).problems[0]
    assert problem.startswith(f"{file.name}: ")
    assert message in problem


def test_old_damage_and_duplicates_are_problems(shards: Path):
    data = first_shard(shards).read_bytes()
    (shards / "zz-copy.tar").write_bytes(data[: len(data) // 3 + 7])
    build_index(shards)
    problems = verify_shards(shards).problems
    assert any(problem.startswith("zz-copy.tar: ") for problem in problems)
    assert "with the key of an earlier one" in problems[-1]


def test_a_table_of_another_index_is_a_problem(shards: Path):
    tables = sorted((shards / "index" / "tables").iterdir())
    tables[0].write_bytes(tables[1].read_bytes())
    (problem,) = verify_shards(shards).problems
    assert first_shard(shards).name in problem


def test_without_an_index_there_is_nothing_to_verify(tmp_path: Path):
    assert not has_index(tmp_path)
    with pytest.raises(UserError, match="latentmill index"):
        verify_shards(tmp_path)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two shards of images in three formats, indexed with checksums; three samples are bad."""
    damage: dict[int, dict[str, bytes | None]] = {
        1: {"png": members_of(1)["png"][:-30]},
        3: {"jpg": b"no image"},
        6: {"jpg": None},
    }
    write_shards(tmp_path / "m", (5, 4), damage)
    build_index(tmp_path / "m", deep=True)
    return tmp_path / "m"


@pytest.mark.parametrize("threads", [1, 3])
def test_decode_lists_every_bad_image(mixed: Path, threads: int):
    assert verify_shards(mixed).problems == []
    report = verify_shards(mixed, decode=True, threads=threads)
    found = [(bad.shard, bad.key, bad.stage) for bad in report.bad_samples]
    assert found == [
        ("s-000.tar", "000001", "decode"),
        ("s-000.tar", "000003", "decode"),
        ("s-001.tar", "000006", "member"),
    ]
    assert all(bad.reason for bad in report.bad_samples)
    assert report.problems == ["3 samples are bad"]


def test_a_changed_member_is_named_by_its_checksum(mixed: Path):
    file = mixed / "s-001.tar"
    offset, _ = Index.open(mixed).table(1).members(2)["npy"]
    data = bytearray(file.read_bytes())
    data[offset + 130] ^= 4  # of the values: it can still be decoded
    file.write_bytes(data)
    report = verify_shards(mixed)
    (bad,) = report.bad_samples
    assert (bad.shard, bad.key, bad.stage) == ("s-001.tar", "000007", "checksum")
    assert bad.reason == "another content than was indexed: .npy"
    assert report.problems == [
        "s-001.tar: has another content than was indexed (sha256)",
        "1 samples are bad",
    ]


def test_without_any_image_there_is_nothing_to_decode(tmp_path: Path):
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "txt": "text"})
    build_index(tmp_path)
    with pytest.raises(UserError, match=r"No sample .* The index has: txt \(1\)"):
        verify_shards(tmp_path, decode=True)


def test_no_threads_are_refused(mixed: Path):
    with pytest.raises(UserError, match="threads is 0"):
        verify_shards(mixed, decode=True, threads=0)


def table_of(shards: Path, change: Callable[[str], str]) -> Path:
    """Write the first shard's table again with other names, as if our reader had a fault."""
    path = shards / "index" / "tables" / f"{first_shard(shards).name}.arrow"
    table = ShardTable(path)
    samples = [TarSample(change(s.key), s.members, s.checksums) for s in table.samples()]
    splits, labels = table.split_numbers.tolist(), table.labels.tolist()
    write_table(path, samples, splits, labels, table.origin, with_checksums=True)
    return path


def test_members_are_compared_with_those_of_pythons_tarfile(shards: Path):
    name, table = first_shard(shards).name, Index.open(shards).table(0)
    num = sum(len(sample.members) for sample in table.samples())
    (key, *_), (suffix, *_) = table.keys(), table.members(0)
    table_of(shards, lambda key: f"{key}x")
    assert verify_shards(shards).problems == [
        f"{name}: Python's tarfile, and so webdataset, does not find {num} members, such as "
        f"{key}x.{suffix}",
        f"{name}: Python's tarfile finds {num} members more, such as {key}.{suffix}",
    ]


def test_a_shard_that_tarfile_ends_early_is_a_problem(shards: Path):
    file = first_shard(shards)
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        header = list(tar)[6].offset
    data[header] ^= 1
    file.write_bytes(data)
    index = build_index(shards)
    first, second = (p for p in verify_shards(shards).problems if p.startswith(file.name))
    assert "damaged header" in first
    lost = sum(len(sample.members) for sample in index.table(0).samples()) - 6
    assert f"tarfile, and so webdataset, does not find {lost} members" in second


def test_shards_beside_those_of_the_index_are_listed(mixed: Path):
    (mixed / "later.tar").write_bytes((mixed / "s-000.tar").read_bytes())
    report = verify_shards(mixed)
    assert (report.problems, report.not_indexed) == ([], ["later.tar"])


def test_the_command_prints_every_bad_sample(mixed: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(mixed), "--decode", "--json"]) == 1
    printed = capsys.readouterr()
    bad = json.loads(printed.out)["bad_samples"]
    assert bad[2] == {
        "shard": "s-001.tar",
        "key": "000006",
        "stage": "member",
        "reason": "the sample has no member with a wanted suffix",
    }
    assert "verify: 2 of 2 shards (100 %), " in printed.err


def test_the_command_indexes_deeply_and_verifies_shards_elsewhere(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["index", str(mixed), "--out", str(tmp_path / "i"), "--deep"]) == 0
    assert Index.open(tmp_path / "i").has_checksums
    assert main(["verify", str(tmp_path / "i"), "--shards", str(mixed)]) == 0
    assert main(["verify", str(tmp_path / "i")]) == 1
    assert "s-000.tar: is missing" in capsys.readouterr().out
    pattern = str(mixed / "s-{000..002}.tar")
    assert main(["index", pattern, "--out", str(tmp_path / "i")]) == 2
    assert "there is no shard" in (said := capsys.readouterr().err)
    assert "the pattern expands to" in said
