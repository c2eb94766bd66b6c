"""An export behind HTTP or in any other store reads as from local disk, by ranges."""

import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.data.storage import RemotePolicy, ShardReadError
from pipeline.latents import LatentDataset
from pipeline.latents.formats import READERS
from tests.data.storage.fault_server import FaultServer, always, serving, short_body
from tests.data.storage.test_http_faults import now_and_then
from tests.latents.exports import make_rows, write_export

each_kind = pytest.mark.parametrize("kind", READERS)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [make_rows(n, count, (2, 3)) for n, count in enumerate((11, 1, 30))]
    return write_export(tmp_path_factory.mktemp("export"), shards, list(READERS))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this machine are spoken to directly, whatever its environment says."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def files_of(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file() and "_run" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def server(out: Path) -> Iterator[FaultServer]:
    with serving(FaultServer(files_of(out))) as server:
        yield server


def assert_same(remote: LatentDataset, local: LatentDataset) -> None:
    assert len(remote) == len(local)
    one, other = remote[:], local[:]
    assert (one.keys, one.metadata) == (other.keys, other.metadata)
    for name in ("mu", "logvar", "valid", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert remote.by_key("0002/00017").index == local.by_key("0002/00017").index == 29
    np.testing.assert_array_equal(remote.column("label"), local.column("label"))
    for a, b in zip(remote.batches(6), local.batches(6), strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.mu, b.mu)


@each_kind
def test_http(kind: str, out: Path, server: FaultServer):
    for normalized in (False, True):
        with LatentDataset(server.url, format=kind, normalized=normalized) as remote:
            assert_same(remote, LatentDataset(out, format=kind, normalized=normalized))
    asked = [request for request in server.requests if request.method == "GET"]
    assert all("range" in request.headers for request in asked)
    data = {request.path for request in asked if request.path.startswith("data/")}
    assert {path.split("/")[1] for path in data} == {kind}


@each_kind
def test_transfers_that_break_go_on(kind: str, out: Path):
    plan = now_and_then(short_body, random.Random(1), 0.2)
    policy = RemotePolicy(max_wait_seconds=0.01)
    with serving(FaultServer(files_of(out), plan=plan)) as server:
        with LatentDataset(server.url, remote=policy, format=kind) as remote:
            assert_same(remote, LatentDataset(out, format=kind))
        assert server.num_faults > 0


def test_a_pickled_dataset_reads_on(out: Path, server: FaultServer):
    with LatentDataset(server.url) as ds, pickle.loads(pickle.dumps(ds)) as other:
        assert_same(other, LatentDataset(out))


@each_kind
def test_any_store_of_fsspec(kind: str, out: Path):
    memory = fsspec.filesystem("memory")
    memory.put(f"{out}/", "/latents", recursive=True)
    try:
        remote = LatentDataset("memory://latents", format=kind)
        assert_same(remote, LatentDataset(out, format=kind))
    finally:
        memory.rm("/latents", recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_a_row_costs_a_part_of_its_file(kind: str, tmp_path: Path):
    """A matrix is read in blocks of 4 MB, Parquet's latents by row group; a tar as a whole."""
    rows = make_rows(0, 2400, (4, 32, 32))  # 39 MB of mu, 39 MB of logvar
    write_export(tmp_path, [rows], [kind])
    files = files_of(tmp_path)
    with serving(FaultServer(files)) as server, LatentDataset(server.url) as ds:
        row = ds.by_key("0000/01234")
        np.testing.assert_array_equal(row.mu, rows.latents["mu"][1234])
        np.testing.assert_array_equal(row.logvar, rows.latents["logvar"][1234])
        read = 0
        for request in server.requests:
            if "range" in request.headers and request.method == "GET":
                first, last = request.headers["range"].removeprefix("bytes=").split("-")
                read += int(last) - int(first) + 1
        num_requests = len(server.requests)
        assert ds[1235].key == "0000/01235"
        assert len(server.requests) == num_requests  # what was read is kept
    assert read < (0.5 if kind != "safetensors" else 0.2) * sum(map(len, files.values()))


@pytest.mark.slow
def test_what_is_kept_is_bounded(out: Path, server: FaultServer):
    local = LatentDataset(out, format="npy")
    with LatentDataset(server.url, format="npy", cache_bytes=1) as remote:
        assert_same(remote, local)
        before = len(server.requests)
        assert_same(remote, local)
        assert len(server.requests) > before  # nothing could be kept


def test_what_is_not_there(out: Path, server: FaultServer):
    del server.files["data/tar/shard-000001.tar"]
    missing = f"{server.url}/data/tar/shard-000001.tar is missing"
    with LatentDataset(server.url, format="tar") as ds, pytest.raises(UserError, match=missing):
        ds[11]
    del server.files["_SUCCESS"]
    with pytest.raises(UserError, match=f"{server.url} holds an unfinished export"):
        LatentDataset(server.url)
    del server.files["manifest.json"]
    with pytest.raises(UserError, match=f"{server.url} holds no export"):
        LatentDataset(server.url)


@each_kind
def test_a_store_that_does_not_answer_is_no_damage(kind: str, server: FaultServer):
    policy = RemotePolicy(attempts=2, max_wait_seconds=0.01)
    with LatentDataset(server.url, remote=policy, format=kind) as ds:
        server.plan = always(short_body)
        ds.close()  # nothing is taken from an open connection
        with pytest.raises((ShardReadError, UserError), match="Given up after") as error:
            ds.by_key("0002/00017")
        assert "damaged" not in str(error.value)
