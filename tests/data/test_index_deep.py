"""The index in depth: one forward pass, checksums, what is stopped, and what a user gets wrong."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.data.index import Index, build_index, scan
from pipeline.data.index.one_pass import LOCAL_CHUNK_BYTES, OnePass
from pipeline.data.index.splits import SplitSpec
from pipeline.data.storage.local import LocalStorage
from tests.processes import ROOT
from tests.shards import write_tiny_shards

JSON_SPLIT = SplitSpec(by="json.group", fractions={"train": 0.5, "held_out": 0.5})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_tiny_shards(tmp_path / "shards")
    return tmp_path / "shards"


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Recording(LocalStorage):
    """A store that keeps what was read of it."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.reads: list[tuple[int, int]] = []

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        self.reads.append((offset, num_bytes))
        return super().read(name, offset, num_bytes)


def test_a_healthy_shard_is_read_once_and_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(0, 200_000, 60).tolist(), 3 * LOCAL_CHUNK_BYTES + 1]
    files = [
        (f"{n:03d}.{suffix}", rng.bytes(size))
        for n, size in enumerate(sizes)
        for suffix in ("bin", "json")
        if suffix == "bin"
    ]
    files += [(f"{n:03d}.json", b'{"group": %d}' % n) for n in range(len(sizes))]
    write_tar(tmp_path / "a.tar", sorted(files))
    stores: list[Recording] = []

    def open_recording(root: str) -> Recording:
        stores.append(Recording(root))
        return stores[-1]

    monkeypatch.setattr(scan, "open_storage", open_recording)
    build_index(tmp_path, deep=True, split=JSON_SPLIT)
    (store,) = [store for store in stores if store.reads]
    places = [0]
    for offset, num_bytes in store.reads:
        if num_bytes > 512:  # a .json over the border of two chunks is looked back at
            assert offset == places[-1]
            places.append(offset + num_bytes)
    assert places[-1] == (tmp_path / "a.tar").stat().st_size
    assert sum(size for _, size in store.reads) <= places[-1] + 10 * 512


def test_a_pass_looks_back_and_still_hashes_the_whole(tmp_path: Path):
    data = np.random.default_rng(1).bytes(5 * LOCAL_CHUNK_BYTES // 2)
    (tmp_path / "a.tar").write_bytes(data)
    rng = np.random.default_rng(2)
    storage = LocalStorage(str(tmp_path))
    with OnePass(storage, "a.tar", len(data)) as bytes_of:
        for _ in range(100):
            start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
            assert bytes_of.read(start, stop - start) == data[start:stop]
            assert bytes_of.crc32(start, stop - start) == zlib.crc32(data[start:stop])
        assert bytes_of.read(len(data) - 3, 100) == data[-3:]
        sha256 = bytes_of.sha256()
    with OnePass(storage, "a.tar", len(data)) as bytes_of:
        assert bytes_of.sha256() == sha256
    storage.close()


def test_deep_tables_hold_the_checksum_of_every_member(shards: Path):
    index = build_index(shards, deep=True)
    assert index.has_checksums
    for number, entry in enumerate(index.shards):
        data = (shards / entry.name).read_bytes()
        for suffix in ("png", "json"):
            ranges = index.table(number).ranges_of((suffix,))
            spans = zip(ranges.offset.tolist(), ranges.num_bytes.tolist(), strict=True)
            assert ranges.crc32.tolist() == [zlib.crc32(data[at : at + n]) for at, n in spans]
        assert set(index.table(number).ranges_of(("none",)).crc32.tolist()) <= {-1}


def test_a_deep_table_satisfies_a_plain_index_and_not_the_other_way(
    shards: Path, monkeypatch: pytest.MonkeyPatch
):
    assert not build_index(shards).has_checksums
    plain = Index.open(shards)
    assert set(plain.table(0).ranges_of(("png",)).crc32.tolist()) == {-1}
    deep = build_index(shards, deep=True)  # reads the shards again
    assert deep.has_checksums
    assert deep.dataset_id == plain.dataset_id
    monkeypatch.setattr(scan, "_write", lambda *_: pytest.fail("a shard was read again"))
    assert build_index(shards).has_checksums
    assert build_index(shards, deep=True, split=SplitSpec(seed=3)).has_checksums


def test_progress_tells_shards_speed_and_time_left(shards: Path):
    lines: list[str] = []
    build_index(shards, progress=lambda line, _: lines.append(line))
    assert [line.split(" (")[0] for line in lines] == [
        f"index: {n} of 5 shards" for n in range(1, 6)
    ]
    assert all("MB/s" in line for line in lines)
    assert lines[0].endswith(" left")
    assert not lines[-1].endswith(" left")


@pytest.mark.fault
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_index_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(0)
    for number in range(40):
        files = [(f"{number}-{n}.bin", rng.bytes(300_000)) for n in range(10)]
        write_tar(tmp_path / "shards" / f"{number:02d}.tar", files)
    build_index(tmp_path / "shards", out=tmp_path / "whole", deep=True)
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "pipeline", "index", tmp_path / "shards", "--out", out]
    argv += ["--workers", "2", "--deep"]
    # A shell's background jobs ignore SIGINT, and so would what they start.
    with subprocess.Popen(
        argv,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("index: 1 of 40 shards")
        if sent == signal.SIGINT:  # as a terminal sends it: to the workers, too
            os.killpg(running.pid, sent)
        else:
            running.send_signal(sent)
        said = running.stderr.read()
    assert running.returncode == (1 if sent == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in said
    limit = time.monotonic() + 20
    while group_is_alive(running.pid):  # no worker outlives its parent
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert not (out / "index" / "manifest.json").exists()
    done = len(list((out / "index" / "tables").glob("*.arrow")))
    assert 0 < done < 40
    write, written = scan._write, []
    monkeypatch.setattr(scan, "_write", lambda task, *a: (written.append(task), write(task, *a)))
    build_index(tmp_path / "shards", out=out, deep=True)
    assert 40 - done <= len(written) <= 40 - done + 2  # two may lack their time when it was killed
    assert files_of(out) == files_of(tmp_path / "whole")


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# --- what a user gets wrong


def test_suffixes_that_no_sample_has_are_refused_with_those_there_are(shards: Path):
    index = build_index(shards)
    index.check_suffixes(["jpg", "png"])
    with pytest.raises(UserError, match=r"suffix of jpg, webp .*has: cls \(60\), json \(60\), png"):
        index.check_suffixes(["jpg", "webp"])


def test_an_index_without_a_list_of_suffixes_is_judged_by_its_tables(shards: Path):
    build_index(shards)
    manifest = shards / "index" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"suffixes"', '"other"'))
    Index.open(shards).check_suffixes(["jpg", "png"], 0.0)
    with pytest.raises(UserError, match="No sample of .* The index has very many suffixes"):
        Index.open(shards).check_suffixes(["jpg"])


def test_more_suffixes_than_16_bits_can_count(tmp_path: Path):
    """Dots in the names: webdataset takes all after the first one for the suffix."""
    count = 2**15 + 5
    write_tar(tmp_path / "a.tar", [(f"image.{n:06d}.png", b"%d" % n) for n in range(count)])
    index = build_index(tmp_path)
    assert index.num_samples == 1
    members = index.table(0).members(0)
    assert len(members) == count
    data = (tmp_path / "a.tar").read_bytes()
    offset, size = members["032770.png"]
    assert data[offset : offset + size] == b"32770"
    assert index.suffixes is None  # too many to list
    index.check_suffixes(["000007.png"], 0.0)
    with pytest.raises(UserError, match="names hold more than one dot"):
        index.check_suffixes(["jpg"])
    assert index.left_out["dotted_suffix"]["count"] == count
    assert len(index.left_out_lines()) == 1


def test_two_samples_with_one_key_are_reported_with_their_shards(tmp_path: Path):
    files = [("x.png", b"1"), ("y.png", b"2"), ("x.png", b"3")]
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "b.tar", [("y.png", b"4"), ("z.png", b"5")])
    index = build_index(tmp_path)
    assert index.num_samples == 5  # each is a sample of its own, with its own uid
    assert index.num_duplicate_keys == 2
    assert index.duplicate_keys == [["x", "a.tar", "a.tar"], ["y", "a.tar", "b.tar"]]


def test_shards_that_the_index_does_not_know_are_listed(shards: Path):
    index = build_index(shards)
    assert index.not_indexed(shards) == []
    (shards / "zz.tar").write_bytes((shards / "tiny-0000.tar").read_bytes())
    assert index.not_indexed(shards) == ["zz.tar"]
    index.check_shards(shards)  # those of the index are as they were
    assert index.not_indexed(shards.parent / "nowhere") == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("tiny-0001.tar", "../tiny-0001.tar"),
        lambda text: text.replace("tiny-0001.tar", "/etc/passwd"),
        lambda text: text.replace("tiny-0001.tar", "a/../../b.tar"),
    ],
)
def test_a_manifest_with_names_that_climb_is_refused(shards: Path, change: Callable[[str], str]):
    build_index(shards)
    manifest = shards / "index" / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(UserError, match="does not lie below the data set's root"):
        Index.open(shards)


def test_a_pattern_that_climbs_writes_no_table_elsewhere(shards: Path, tmp_path: Path):
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    os.link(shards / "tiny-0000.tar", tmp_path / "deep" / "a.tar")
    pattern = f"{tmp_path}/deep/a.tar::{tmp_path}/deep/folder/../../shards/tiny-0001.tar"
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="does not lie below"):
        build_index(pattern, out=tmp_path / "out")
    assert set(tmp_path.rglob("*")) == before


def test_a_shard_that_shrinks_while_it_is_indexed_is_an_error(
    shards: Path, monkeypatch: pytest.MonkeyPatch
):
    states = LocalStorage.states

    def as_before(self: LocalStorage, names: list[str]) -> object:
        found = states(self, names)
        if names == ["tiny-0001.tar"]:  # right before it is read
            os.truncate(shards / "tiny-0001.tar", 700)
        return found

    monkeypatch.setattr(LocalStorage, "states", as_before)
    with pytest.raises(UserError, match=r"Indexing .*tiny-0001\.tar: .* ends at byte 700"):
        build_index(shards)
