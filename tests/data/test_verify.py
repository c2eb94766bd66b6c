"""Shards against their index: nothing is wrong until something is, and then it is named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.index import build_index
from pipeline.data.pack import pack_sprites
from pipeline.data.verify import has_index, verify_shards
from pipeline.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pack_sprites(tmp_path / "s", count=12, shard_samples=5)
    return tmp_path / "s"


def first_shard(shards: Path) -> Path:
    return sorted(shards.glob("*.tar"))[0]


def test_untouched_shards_have_no_problem(shards: Path):
    lines: list[str] = []
    report = verify_shards(shards, progress=lines.append)
    assert report.problems == []
    assert (report.num_shards, report.num_samples) == (3, 12)
    assert report.num_bytes == sum(file.stat().st_size for file in shards.glob("*.tar"))
    assert lines[0].startswith("verify: 1 of 3 shards, ")
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("verify: 3 of 3 shards, ")


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
    assert "occur more than once" in problems[-1]


def test_a_table_of_another_index_is_a_problem(shards: Path):
    tables = sorted((shards / "index" / "tables").iterdir())
    tables[0].write_bytes(tables[1].read_bytes())
    (problem,) = verify_shards(shards).problems
    assert first_shard(shards).name in problem


def test_without_an_index_there_is_nothing_to_verify(tmp_path: Path):
    assert not has_index(tmp_path)
    with pytest.raises(UserError, match="latentmill index"):
        verify_shards(tmp_path)
