"""Files are whole or absent: under failures, under races, and for readers who look meanwhile."""

import errno
import hashlib
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.common.files import (
    CHUNK_BYTES,
    canonical_json,
    create_exclusive,
    publish,
    sha256_file,
    temporary_name,
    write_atomic,
    write_json,
)


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Let the operating system refuse to write more than this into any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_write_atomic_creates_and_replaces(tmp_path: Path):
    path = tmp_path / "a"
    for data in (b"one", b"", b"longer than one"):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert names(tmp_path) == {"a"}


def test_a_reader_of_a_replaced_file_sees_the_old_or_the_new_content(tmp_path: Path):
    path = tmp_path / "a"
    contents = [bytes([number]) * 100_000 for number in range(30)]
    write_atomic(path, contents[0])
    done = threading.Event()

    def read() -> int:
        seen = set()
        while not done.is_set():
            seen.add(path.read_bytes())
        assert seen <= set(contents)
        return len(seen)

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        for content in contents:
            write_atomic(path, content)
        done.set()
        assert reader.result() >= 1


@pytest.mark.parametrize("write", [write_atomic, create_exclusive])
@pytest.mark.parametrize("room", [0, 1, 4096, 99_999])
def test_a_write_without_room_fails_and_leaves_nothing(tmp_path: Path, write, room: int):
    with files_limited_to(room), pytest.raises(OSError) as raised:
        write(tmp_path / "a", bytes(100_000))
    assert raised.value.errno == errno.EFBIG
    assert names(tmp_path) == set()


def test_a_failed_replacement_keeps_the_former_content(tmp_path: Path):
    write_atomic(tmp_path / "a", b"former")
    with files_limited_to(10), pytest.raises(OSError):
        write_atomic(tmp_path / "a", bytes(100))
    assert (tmp_path / "a").read_bytes() == b"former"
    assert names(tmp_path) == {"a"}


def test_a_name_that_cannot_be_replaced_leaves_no_litter(tmp_path: Path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "a", b"data")
    assert names(tmp_path) == {"a"}


def test_json_is_readable_sorted_and_knows_no_nan(tmp_path: Path):
    write_json(tmp_path / "a", {"b": 1, "a": [2]})
    assert (tmp_path / "a").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert canonical_json({"b": 1, "a": [2]}) == b'{"a":[2],"b":1}'
    with pytest.raises(ValueError):
        write_json(tmp_path / "nan", {"a": float("nan")})
    assert names(tmp_path) == {"a"}


def test_of_racing_creators_exactly_one_wins(tmp_path: Path):
    num_threads = 8
    start = threading.Barrier(num_threads)

    def create(number: int, path: Path) -> bool:
        start.wait()
        return create_exclusive(path, bytes([number]) * 1000)

    with ThreadPoolExecutor(num_threads) as pool:
        for race in range(30):
            path = tmp_path / f"race-{race}"
            won = list(pool.map(create, range(num_threads), [path] * num_threads))
            assert won.count(True) == 1
            assert path.read_bytes() == bytes([won.index(True)]) * 1000
    assert names(tmp_path) == {f"race-{race}" for race in range(30)}


def test_an_existing_file_is_never_created_again(tmp_path: Path):
    assert create_exclusive(tmp_path / "a", b"first")
    assert not create_exclusive(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == {"a"}


def test_publish_moves_a_directory_and_never_over_a_full_one(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish(tmp_path / "first", tmp_path / "final")
    assert names(tmp_path) == {"second", "final"}
    with pytest.raises(OSError):
        publish(tmp_path / "second", tmp_path / "final")
    assert (tmp_path / "final/file").read_text() == "first"


def test_temporary_names_are_unused_siblings(tmp_path: Path):
    made = {temporary_name(tmp_path / "a") for _ in range(1000)}
    assert len(made) == 1000
    assert all(path.parent == tmp_path and path.name.startswith("a.tmp-") for path in made)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 1])
def test_sha256_of_any_size(tmp_path: Path, size: int):
    (tmp_path / "a").write_bytes(b"a" * size)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"a" * size).hexdigest()
