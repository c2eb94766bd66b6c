"""S3 by moto, any store of fsspec (its memory), and local disk: patterns, pins, publishing."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import boto3
import fsspec
import pytest
from s3fs import S3FileSystem

from pipeline.common.errors import UserError
from pipeline.data.storage import (
    RemotePolicy,
    ShardReadError,
    ShardState,
    open_storage,
)
from pipeline.data.storage.http import HttpStorage
from pipeline.data.storage.local import LocalStorage
from pipeline.data.storage.opening import open_writable
from pipeline.data.storage.patterns import find_shards
from tests.data.storage.conftest import BUCKET
from tests.data.storage.fault_server import FaultServer, serving, short_body
from tests.data.storage.test_http_faults import now_and_then

CONTENT = random.Random(1).randbytes(50_000)
NAMES = tuple(f"s-{i:03d}.tar" for i in range(12))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (root / name).write_bytes(CONTENT[: number * 1000])
    (root / "sub" / "deep.tar").write_bytes(b"deep")
    (root / "notes.txt").write_text("none")
    return root


@pytest.fixture(params=["local", "file", "s3", "memory"])
def root(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The same files in every store that can list."""
    if request.param == "s3":
        upload: Callable[[Path, str], str] = request.getfixturevalue("s3")
        yield upload(folder, f"stores/{folder.parent.name}")
    elif request.param == "memory":
        memory = fsspec.filesystem("memory")
        place = f"/stores/{folder.parent.name}"
        memory.put(f"{folder}/", place, recursive=True)
        yield f"memory:/{place}"
        memory.rm("/stores", recursive=True)
    else:
        yield f"file://{folder}" if request.param == "file" else str(folder)


def test_folders_globs_and_braces_find_the_same_shards_in_every_store(root):
    for pattern in (
        "",
        "/",
        "/*.tar",
        "/s-{000..011}.tar",
        "/s-{000..005}.tar::{root}/s-00[0-9].tar",
    ):
        found = find_shards(root + pattern.replace("{root}", root))
        names = NAMES[:10] if "::" in pattern else NAMES
        assert (found.root, found.names) == (root.removeprefix("file://"), names), pattern
    nested = find_shards(f"{root}/**/*.tar")
    assert nested.names == (*NAMES, "sub/deep.tar")


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("/none", "no .tar shard found|there is no shard .*none"),
        ("/none-*.tar", "no .tar shard found there.*looked for .*none-\\*.tar"),
        ("/s-{010..013}.tar", "no shard .*s-012.tar.*expands to .*s-010.tar.*(4 in all)"),
        ("/s-{0..2.tar", "cannot be expanded"),
    ],
)
def test_what_is_missing_is_named_with_the_expansion(root, pattern, message):
    with pytest.raises(UserError, match=message):
        find_shards(root + pattern)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("pipe:cat {0..3}.tar", "'pipe'.*never run"),
        ("what://x/{0..3}.tar", "the scheme 'what' is unknown.*s3://"),
        ("http://127.0.0.1:1/shards", "HTTP cannot list"),
        ("http://127.0.0.1:1/shards/*.tar", "HTTP cannot list"),
        ("/local/a.tar::s3://b/c.tar", "local paths and URLs"),
        ("http://127.0.0.1:1/a.tar::http://127.0.0.1:2/a.tar", "in one store"),
        ("http://127.0.0.1:1/a.tar?x=1::http://127.0.0.1:1/b.tar?x=2", "one query for all"),
    ],
)
def test_patterns_that_no_store_can_serve_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        find_shards(pattern)


def test_http_patterns_are_braces_with_one_query():
    files = {f"p/s {i}.tar": b"x" for i in range(3)} | {f"p/s%20{i}.tar": b"x" for i in range(3)}
    with serving(FaultServer(files)) as server:
        found = find_shards(f"{server.url}/p/s%20{{0..2}}.tar?key=1")
        assert found.root == f"{server.url}/p?key=1"
        assert found.names == ("s 0.tar", "s 1.tar", "s 2.tar")


def test_every_store_reads_ranges_states_and_small_files(root):
    with closing(open_storage(root)) as storage:
        assert isinstance(storage, LocalStorage) == ("://" not in root or "file:" in root)
        states = storage.states([*NAMES, "sub/deep.tar", "none.tar", "sub"])
        assert [states[name].num_bytes for name in NAMES] == [1000 * i for i in range(12)]
        assert states["sub/deep.tar"].num_bytes == 4
        assert states["none.tar"] is None
        assert storage.read(NAMES[11], 77, 5000) == CONTENT[77:5077]
        assert storage.read_whole("notes.txt") == b"none"
        assert storage.read_whole("none.txt") is None
        with pytest.raises(ShardReadError, match=f"{NAMES[3]} ends at byte 3000, before 3001"):
            storage.read(NAMES[3], 2999, 2)
        with pytest.raises(ShardReadError, match="none.tar"):
            storage.read("none.tar", 0, 1)


@pytest.mark.parametrize("root", ["s3", "memory"], indirect=True)
def test_a_changed_object_is_an_error_in_every_store_with_tags(root):
    name, store = NAMES[5], open_writable(root)
    with closing(open_storage(root)) as storage:
        assert storage.read(name, 0, 10) == CONTENT[:10]
        store.put(name, CONTENT[1:5001])  # of the same size
        with pytest.raises(ShardReadError, match=f"{root}/{name} changed while it was in use"):
            storage.read(name, 0, 10)
    with closing(open_storage(root)) as storage:
        storage.expect(name, ShardState(4000))
        with pytest.raises(ShardReadError, match="it has 5000 bytes, not 4000"):
            storage.read(name, 0, 10)


def test_publishing_puts_whole_files_and_moves_and_deletes_them(root, tmp_path):
    store = open_writable(root)
    (tmp_path / "large").write_bytes(CONTENT)
    store.put("new/a.bin", tmp_path / "large")
    store.put("new/b.json", b"{}")
    store.put("new/b.json", b"[]")
    with closing(open_storage(root)) as storage:
        assert storage.read_whole("new/a.bin") == CONTENT
        assert storage.read_whole("new/b.json") == b"[]"
    store.move("new/b.json", "new/c.json")
    assert [store.exists(f"new/{name}") for name in ("a.bin", "b.json", "c.json")] == [1, 0, 1]
    store.delete("new/c.json")
    store.delete("new/c.json")
    assert not store.exists("new/c.json")
    files, place = fsspec.core.url_to_fs(root)
    assert [path.rpartition("/")[2] for path in files.find(f"{place}/new")] == ["a.bin"]


def test_a_name_is_taken_once(root):
    store = open_writable(root)
    if root.startswith("memory"):
        with pytest.raises(UserError, match="no way to create a file only if it does not exist"):
            store.check_exclusive("run")
        return
    assert store.check_exclusive("run")
    assert store.sizes("run") == {}
    assert store.create("run/a.json", b"first")
    assert not store.create("run/a.json", b"second")
    assert store.read("run/a.json") == b"first"
    with ThreadPoolExecutor(8) as racers:
        for name in ("x", "y", "z"):
            wins = list(racers.map(lambda i: store.create(name, b"%d" % i), range(8)))  # noqa: B023
            assert sum(wins) == 1
            assert store.read(name) == b"%d" % wins.index(True)


def fill_half(store):
    with store.new_folder("stage/two") as folder:
        (folder / "a.bin").write_bytes(b"half")
        raise ZeroDivisionError


def test_folders_are_written_listed_copied_and_removed(root):
    store = open_writable(root)
    with store.new_folder("stage/one") as folder:
        (folder / "a.bin").write_bytes(CONTENT)
        (folder / "b.bin").write_bytes(b"b")
    with pytest.raises(ZeroDivisionError):
        fill_half(store)
    assert store.sizes("stage") == {"stage/one/a.bin": len(CONTENT), "stage/one/b.bin": 1}
    store.move("stage/one/a.bin", "data/x/a.bin")
    with pytest.raises(FileNotFoundError):
        store.move("stage/one/a.bin", "data/x/a.bin")
    with store.local_copy(["data/x/a.bin", "none"]) as copy:
        assert (copy / "data/x/a.bin").read_bytes() == CONTENT
        assert not (copy / "none").exists()
    store.delete_folder("stage")
    store.delete_folder("stage")
    assert store.sizes("stage") == {}
    assert store.read("stage/one/b.bin") is None
    assert store.sizes("data") == {"data/x/a.bin": len(CONTENT)}
    assert set(store.sizes()) >= {"data/x/a.bin"}


@pytest.mark.fault
def test_what_is_in_use_stays_when_its_folder_is_removed(small_disk, tmp_path):
    """A mounted disk is as busy as a removed file of NFS that somebody still writes."""
    disk = small_disk("1m")
    (tmp_path / "a").write_bytes(b"a")
    store = open_writable(tmp_path)
    store.put("disk/b", b"b")
    store.delete_folder("disk")
    assert disk.is_mount()
    assert store.sizes() == {"a": 1}


def test_an_s3_that_ignores_the_condition_is_found_out(s3, folder):
    """On the way to the server `If-None-Match` is taken off: every create succeeds."""
    S3FileSystem.clear_instance_cache()
    store = open_writable(f"{s3(folder, 'careless')}/out")

    def strip(request, **_):
        request.headers.pop("If-None-Match", None)

    store._files.call_s3("list_buckets")  # connects
    store._files.s3.meta.events.register("before-send.s3.PutObject", strip)
    with pytest.raises(UserError, match=r"careless/out offers no way to create .* hard links"):
        store.check_exclusive("run")
    assert store.sizes() == {}
    S3FileSystem.clear_instance_cache()


def test_http_is_read_only_and_unknown_stores_are_refused():
    with pytest.raises(UserError, match="read only"):
        open_writable("https://127.0.0.1/x")
    with pytest.raises(UserError, match="is unknown"):
        open_writable("what://x")


def test_s3_lists_once_for_many_shards_and_reads_by_http(s3, folder):
    with closing(open_storage(s3(folder, "once"))) as storage:
        states = storage.states(NAMES)
        assert storage.counters.num_requests == 0
        assert all(state.tag.startswith('"') for state in states.values())
        client = boto3.client("s3")
        head = client.head_object(Bucket=BUCKET, Key=f"once/{NAMES[4]}")
        assert states[NAMES[4]] == ShardState(4000, head["ETag"])
        assert storage.read(NAMES[4], 1, 9) == CONTENT[1:10]
        assert storage.counters.num_requests == 1


def test_s3_urls_are_signed_by_version_4_unless_the_bucket_is_public(s3, folder, monkeypatch):
    root = s3(folder, "signed")
    seen: list[str] = []
    send = HttpStorage._send

    def watch(storage, method, url, headers, patience):
        seen.append(url)
        return send(storage, method, url, headers, patience)

    monkeypatch.setattr(HttpStorage, "_send", watch)
    with closing(open_storage(root)) as storage:
        storage.read(NAMES[1], 0, 1)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    boto3.client("s3").put_object_acl(Bucket=BUCKET, Key=f"signed/{NAMES[2]}", ACL="public-read")
    with closing(open_storage(root)) as storage:
        assert storage.read(NAMES[2], 0, 1) == CONTENT[:1]
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in seen[0]
    assert "?" not in seen[1]


def test_s3_that_cannot_be_reached_or_entered_is_explained(s3_endpoint, monkeypatch):
    from_s3 = open_storage(f"s3://{BUCKET}/none")
    with pytest.raises(ShardReadError, match=f"s3://{BUCKET}/none/a.tar is gone .*NoSuchKey"):
        from_s3.read("a.tar", 0, 1)
    files = fsspec.filesystem(
        "s3",
        endpoint_url="http://127.0.0.1:1",
        skip_instance_cache=True,
        config_kwargs={"retries": {"max_attempts": 0}},
    )
    monkeypatch.setattr(from_s3, "_files", files)
    with pytest.raises(UserError, match=f"s3://{BUCKET}/none cannot be listed .*environment"):
        from_s3.states(["a.tar"])


def test_s3_has_the_same_patience_as_http(s3_endpoint, monkeypatch):
    rng = random.Random(2)
    server = FaultServer({f"{BUCKET}/p/a.tar": CONTENT}, now_and_then(short_body, rng))
    with serving(server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        S3FileSystem.clear_instance_cache()
        storage = open_storage(f"s3://{BUCKET}/p", RemotePolicy(max_wait_seconds=0.01))
        for start in range(0, 50_000, 5000):
            assert storage.read("a.tar", start, 5000) == CONTENT[start : start + 5000]
        assert storage.counters.num_reopened > 0
        assert storage.counters.num_retries == server.num_faults
    S3FileSystem.clear_instance_cache()


def test_other_stores_are_tried_again_by_the_same_policy(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/again/a.tar", CONTENT)
    storage = open_storage("memory://again", RemotePolicy(attempts=3, max_wait_seconds=0.01))
    failures = [TimeoutError("slow"), ConnectionError("broken")]
    read = type(memory).cat_file

    def flaky(self, path, start=None, end=None, **kwargs):
        if failures:
            raise failures.pop()
        return read(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert storage.read("a.tar", 5, 5) == CONTENT[5:10]
    assert storage.counters.num_retries == 2
    failures += [OSError(str(i)) for i in range(9)]
    with pytest.raises(ShardReadError, match="memory://again/a.tar: .*after 3 attempts"):
        storage.read("a.tar", 5, 5)
    memory.rm("/again", recursive=True)
