"""Indexes of remote shards, and remote indexes: the same data set, wherever it lies."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.data.index import Index, build_index, scan
from pipeline.data.index.manifest import has_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.index.verify import verify_shards
from tests.data.storage.fault_server import FaultServer, serving
from tests.data.streams import delivered, write_shards
from tests.shards import TINY_COUNTS, write_tiny_shards

pytestmark = pytest.mark.slow
JSON_SPLIT = SplitSpec(by="json.group", fractions={"train": 0.5, "held_out": 0.5})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_tiny_shards(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").rstrip("]")


def contents(index: Index) -> list[object]:
    """All that the tables say."""
    tables = [index.table(number) for number in range(len(index.shards))]
    return [(table.samples(), table.split_numbers.tolist()) for table in tables]


def no_reading(*_: object) -> None:
    pytest.fail("a shard was read again")


def test_shards_in_s3_are_the_same_data_set(
    shards: Path,
    tmp_path: Path,
    s3: Callable[[Path, str], str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
):
    local = build_index(shards, out=tmp_path / "local", deep=True, split=JSON_SPLIT)
    url = s3(shards, prefix)
    remote = build_index(f"{url}/*.tar", out=tmp_path / "remote", deep=True, split=JSON_SPLIT)
    assert remote.dataset_id == local.dataset_id
    assert contents(remote) == contents(local)
    assert all(shard.tag for shard in remote.shards)
    remote.check_shards(url)
    remote.check_shards(shards)  # a copy elsewhere has other tags, or none
    assert verify_shards(tmp_path / "local", shards=url).problems == []

    monkeypatch.setattr(scan, "_write", no_reading)  # their tags have not changed
    again = build_index(f"{url}/*.tar", out=tmp_path / "remote", deep=True, split=JSON_SPLIT)
    assert again.shards == remote.shards


def test_a_changed_object_is_an_error_until_it_is_indexed(
    shards: Path,
    tmp_path: Path,
    s3: Callable[[Path, str], str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
):
    url = s3(shards, prefix)
    index = build_index(url, out=tmp_path / "index", deep=True)
    file = shards / "tiny-0001.tar"
    data = bytearray(file.read_bytes())
    data[data.index(b"IDAT") + 9] ^= 1  # of the same size
    file.write_bytes(data)
    s3(shards, prefix)
    with pytest.raises(UserError, match=r"tiny-0001\.tar has changed \(its tag is .*, not "):
        index.check_shards(url)
    report = verify_shards(tmp_path / "index", shards=url)
    assert [bad.shard for bad in report.bad_samples] == ["tiny-0001.tar"]

    written: list[str] = []
    write = scan._write
    monkeypatch.setattr(
        scan, "_write", lambda task, *a: (written.append(task.name), write(task, *a))
    )
    changed = build_index(url, out=tmp_path / "index", deep=True)
    assert changed.dataset_id != index.dataset_id
    # All objects were uploaded again, and the tag of one with the same bytes is the same.
    assert written == ["tiny-0001.tar"]


def test_an_index_beside_the_shards_in_s3_serves_a_stream(
    tmp_path: Path, s3: Callable[[Path, str], str], prefix: str, monkeypatch: pytest.MonkeyPatch
):
    write_shards(tmp_path / "shards", (5, 8, 4))
    url = s3(tmp_path / "shards", prefix)
    assert not has_index(url)
    built = build_index(url)
    assert built.path == url
    assert has_index(url)
    local = build_index(tmp_path / "shards")
    assert built.dataset_id == local.dataset_id
    opened = Index.open(url)
    assert contents(opened) == contents(local)
    assert delivered(opened, num_steps=3) == delivered(local, num_steps=3)
    assert verify_shards(url, decode=True).problems == []

    monkeypatch.setattr(scan, "_write", no_reading)  # the tables are taken from there
    assert build_index(url).dataset_id == local.dataset_id


def test_a_stopped_index_in_s3_goes_on(
    shards: Path, s3: Callable[[Path, str], str], prefix: str, monkeypatch: pytest.MonkeyPatch
):
    url = s3(shards, prefix)
    write, written = scan._write, []

    def stop_at_third(task: scan.ShardTask, *rest: object) -> None:
        written.append(task.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(task, *rest)

    monkeypatch.setattr(scan, "_write", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build_index(url)
    with pytest.raises(UserError, match="does not exist: run `latentmill index"):
        Index.open(url)
    index = build_index(url)
    assert written == [f"tiny-{n:04d}.tar" for n in (0, 1, 2, 2, 3, 4)]
    assert [shard.samples for shard in index.shards] == list(TINY_COUNTS)


def test_shards_behind_http_need_a_place_for_the_index(
    shards: Path, tmp_path: Path, nginx: Callable[[Path], str]
):
    url = nginx(shards)
    pattern = f"{url}/tiny-{{0000..0004}}.tar"
    with pytest.raises(UserError, match="read only.*--out"):
        build_index(pattern)
    index = build_index(pattern, out=tmp_path / "index", deep=True, split=JSON_SPLIT)
    local = build_index(shards, deep=True, split=JSON_SPLIT)
    assert (index.dataset_id, contents(index)) == (local.dataset_id, contents(local))
    served = Index.open(url)  # what was just written beside the shards
    assert (served.dataset_id, contents(served)) == (local.dataset_id, contents(local))
    assert verify_shards(url, decode=True).problems == []
    table = shards / "index" / "tables" / "tiny-0002.tar.arrow"
    table.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"tiny-0002\.tar\.arrow cannot be read"):
        Index.open(url).table(2)
    (shards / "index" / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"http://.*manifest\.json has format version None"):
        Index.open(url)


def test_a_server_without_tags_is_read_again_and_each_byte_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    local = build_index(shards, out=tmp_path / "local", deep=True, split=JSON_SPLIT)
    written: list[str] = []
    write = scan._write
    monkeypatch.setattr(
        scan, "_write", lambda task, *a: (written.append(task.name), write(task, *a))
    )
    with serving(FaultServer(files, has_tags=False)) as server:
        for _ in range(2):
            server.requests.clear()
            pattern = f"{server.url}/tiny-{{0000..0004}}.tar"
            index = build_index(pattern, out=tmp_path / "index", deep=True, split=JSON_SPLIT)
            assert index.dataset_id == local.dataset_id
            assert {shard.tag for shard in index.shards} == {None}
            ranges = [r.headers["range"] for r in server.requests if r.method == "GET"]
            asked = [[int(n) for n in text.removeprefix("bytes=").split("-")] for text in ranges]
            whole = [last - first + 1 for first, last in asked if last > first]
            assert sum(whole) == sum(map(len, files.values()))
    assert written == 2 * sorted(files)
