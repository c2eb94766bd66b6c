"""Exports in an object store: the bytes of a local one, also after kills; verify on them."""

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError
from s3fs import S3FileSystem
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.__main__ import main
from pipeline.common.errors import DONE, FAILED, PREEMPTED, WRONG_USE, StoreError, UserError
from pipeline.data.storage.opening import open_writable
from pipeline.data.storage.s3 import S3Storage
from pipeline.export.command import begin, work_through
from pipeline.export.commit import commit
from pipeline.export.status import collect_garbage, export_status, finalize_export
from pipeline.export.verify.levels import verify_export
from pipeline.export.verify.reencode import verify_with_run
from pipeline.export.workers import Worker
from pipeline.latents import LatentDataset
from pipeline.latents.formats import READERS
from tests.data.storage.conftest import BUCKET, free_port, no_proxy, s3, s3_endpoint
from tests.export.test_commit import stage_task
from tests.export.world import NUM_SHARDS, SHARD_ROWS, make_config, run_export, tree

__all__ = ["no_proxy", "s3", "s3_endpoint"]  # fixtures

ALL_FORMATS = [{"kind": kind} for kind in READERS]
URL = f"s3://{BUCKET}"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in all formats on the disk; not to be changed."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert run_export(make_config(run_dir, out, formats=ALL_FORMATS)) == DONE
    return out


@pytest.fixture(scope="module")
def remote(s3_endpoint: str, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same by two workers at once, in the bucket; not to be changed."""
    config = make_config(run_dir, f"{URL}/whole/latents", formats=ALL_FORMATS)
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda rank: codes.append(run_export(config, rank)), args=(worker,))
        for worker in (Worker(0, 2), Worker(1, 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [DONE] * 2
    return config.out


@pytest.fixture
def copy(remote: str) -> Iterator[str]:
    """A copy of it, to be damaged."""
    client = boto3.client("s3")
    for key in keys_below("whole/latents"):
        source = {"Bucket": BUCKET, "Key": key}
        client.copy_object(Bucket=BUCKET, Key=key.replace("whole", "copy", 1), CopySource=source)
    yield f"{URL}/copy/latents"
    for key in keys_below("copy/"):
        client.delete_object(Bucket=BUCKET, Key=key)


def keys_below(prefix: str) -> list[str]:
    pages = (
        boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    )
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def content(key: str) -> bytes:
    return boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()


def tree_of(url: str) -> dict[str, str]:
    """As `tree`, without our own code."""
    prefix = f"{url.removeprefix(URL + '/')}/"
    return {
        key.removeprefix(prefix): hashlib.sha256(content(key)).hexdigest()
        for key in keys_below(prefix)
        if not key.startswith(f"{prefix}_run/")
    }


def test_two_workers_leave_the_bytes_of_a_local_export(remote: str, local: Path, data: Path):
    assert tree_of(remote) == tree(local)
    report = verify_export(remote, source=data)
    assert (report.problems, report.rows) == ([], NUM_SHARDS * SHARD_ROWS)


def test_every_state_that_a_death_leaves_is_taken_up(
    s3_endpoint: str, run_dir: Path, finished: Path
):
    """Some tasks done, one committed but not published, one staged, one unused stage."""
    url = f"{URL}/states/out"
    config = make_config(run_dir, url)
    prepared, _ = begin(config, Worker())
    stops = iter([False] * 6 + [True])  # asked before each of a task's three batches
    assert work_through(prepared, Worker(), lambda: next(stops)) == PREEMPTED
    done = export_status(url).committed_tasks
    assert done == 2
    unpublished, staged, litter = (stage_task(prepared, number) for number in (4, 5, 0))
    unpublished.process["seconds"] = 1.0
    assert commit(prepared.export, unpublished)
    status = export_status(url)
    assert (status.finished, status.tasks, status.committed_tasks) == (False, NUM_SHARDS, 3)
    assert (status.committed_rows, status.staged_tasks) == (3 * SHARD_ROWS, ["shard-000005"])
    with pytest.raises(UserError, match=f"{url} cannot be finished: 7 of its 10 tasks"):
        finalize_export(url)

    def stages() -> set[str]:
        return {key.split("/")[3] for key in keys_below("states/out/_stage/")}

    assert stages() == {record.attempt for record in (unpublished, staged, litter)}
    removed = collect_garbage(url)
    assert stages() == {staged.attempt}
    assert removed.removed_files == len(litter.files)
    assert removed.removed_bytes == sum(file.bytes for file in litter.files)
    assert content(f"states/out/{unpublished.files[0].path}")

    assert run_export(config) == DONE
    assert tree_of(url) == tree(finished)
    assert stages() == set()


@pytest.mark.parametrize("seed", range(2))
def test_requests_that_fail_now_and_then_cost_starts_and_nothing_else(
    s3_endpoint: str,
    run_dir: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
):
    """Before the server has seen them, or after it has done them: nobody tries twice here."""
    rng, counts = random.Random(seed), dict.fromkeys(("before-send.s3", "after-call.s3"), 0)

    def breaking(event: str) -> Callable[..., None]:
        def break_off(**_: object) -> None:
            if rng.random() < 0.01:
                counts[event] += 1
                raise EndpointConnectionError(endpoint_url=event)

        return break_off

    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    url = f"{URL}/broken-{seed}/out"
    files = open_writable(url)._files
    files.call_s3("list_buckets")  # connects
    for event in counts:
        files.s3.meta.events.register(event, breaking(event))
    codes = []
    while DONE not in codes:
        assert len(codes) < 60
        try:
            codes.append(run_export(make_config(run_dir, url)))
        except (StoreError, UserError) as error:
            codes.append(FAILED)
            if "EndpointConnectionError" not in str(error):
                raise
    S3FileSystem.clear_instance_cache()
    assert min(counts.values()) > 0
    assert tree_of(url) == tree(finished)
    assert export_status(url).failed_attempts == 0


class Latents(IterableDataset):
    """Batches of an export, divided over the workers of a DataLoader."""

    def __init__(self, ds: LatentDataset):
        super().__init__()
        self.ds = ds

    def __iter__(self) -> Iterator[list[int]]:
        info = get_worker_info()
        for batch in self.ds.batches(20, worker=info.id, workers=info.num_workers):
            yield [*batch.index.tolist(), float(batch.mu.sum())]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_open_connections_of_their_own(remote: str, local: Path, kind: str):
    """s3fs refuses to use connections of the parent process in them."""
    ds = LatentDataset(remote, format=kind)
    expected = LatentDataset(local, format=kind)
    loader = DataLoader(Latents(ds), batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = list(loader)
    assert found == [[*b.index.tolist(), float(b.mu.sum())] for b in expected.batches(20)]
    assert ds[3].key == expected[3].key  # the parent reads on


def test_the_model_is_checked_there_too(
    remote: str,
    run_dir: Path,
    data: Path,
    s3: Callable[[Path, str], str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The export, and the index with its shards, which are read in few pieces."""
    source = s3(data, "source")
    asked: list[tuple[str, int]] = []
    read = S3Storage.read

    def counted(self: S3Storage, name: str, offset: int, num_bytes: int) -> bytes:
        if name.endswith(".tar"):
            asked.append((name, offset))
        return read(self, name, offset, num_bytes)

    with monkeypatch.context() as patched:
        patched.setattr(S3Storage, "read", counted)
        assert verify_export(remote, source=source).problems == []
    assert sorted(asked) == [(f"shard-{number:06d}.tar", 0) for number in range(NUM_SHARDS)]
    report = verify_with_run(remote, str(run_dir), source=source, shards=None, num_tasks=1)
    assert report.problems == []
    assert report.notes == [f"{SHARD_ROWS} rows encoded anew, {SHARD_ROWS} of them bit for bit"]


@pytest.mark.parametrize("kind", READERS)
def test_a_flipped_bit_and_a_missing_object_are_found(copy: str, data: Path, kind: str):
    keys = [key for key in keys_below(f"copy/latents/data/{kind}/") if "shard-000003." in key]
    client = boto3.client("s3")
    for key in keys:
        damaged = bytearray(content(key))
        damaged[len(damaged) // 2] ^= 4
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(damaged))
    names = [key.removeprefix("copy/latents/") for key in keys]
    problems = verify_export(copy, source=data).problems
    for name in names:
        assert f"{name} has other content than was committed (sha256)" in problems
    for key in keys:
        client.delete_object(Bucket=BUCKET, Key=key)
    client.put_object(Bucket=BUCKET, Key=f"copy/latents/data/{kind}/more", Body=b"")
    problems = verify_export(copy, level="listing").problems
    assert problems == [
        *(f"{name} is missing" for name in names),
        f"data/{kind}/more is not of this export",
    ]


@pytest.mark.parametrize("kind", READERS)
def test_it_is_read_as_a_local_one(remote: str, local: Path, kind: str):
    with LatentDataset(remote, format=kind) as there:
        here = LatentDataset(local, format=kind)
        assert there.manifest.sha256 == here.manifest.sha256
        assert there.statistics == here.statistics
        for one, other in ((there[7:90:3], here[7:90:3]), (there[[3, 150]], here[[3, 150]])):
            assert (one.keys, one.metadata) == (other.keys, other.metadata)
            np.testing.assert_array_equal(one.mu, other.mu)
        np.testing.assert_array_equal(there[42].logvar, here[42].logvar)
        np.testing.assert_array_equal(there.by_key("000000099").mu, here.by_key("000000099").mu)
        for one, other in zip(
            there.batches(32, seed=1, epoch=2), here.batches(32, seed=1, epoch=2), strict=True
        ):
            np.testing.assert_array_equal(one.index, other.index)
            np.testing.assert_array_equal(one.mu, other.mu)


def test_a_store_without_exclusive_creation_is_refused(run_dir: Path, tmp_path: Path, capsys):
    config = tmp_path / "export.yaml"
    config.write_text(f"run: {run_dir}\nout: memory://latents/out\n")
    for part in ("run", "plan"):
        assert main(["export", part, str(config)]) == WRONG_USE
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: memory://latents/out offers no way to create a file only if")
        assert "hard links" in line
        assert "s3://" in line
    assert fsspec.filesystem("memory").find("/latents") == []


def test_a_bucket_that_is_not_there(s3_endpoint: str, run_dir: Path, tmp_path: Path, capsys):
    config = tmp_path / "export.yaml"
    config.write_text(f"run: {run_dir}\nout: s3://no-such-bucket/out\n")
    assert main(["export", "run", str(config)]) == WRONG_USE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "s3://no-such-bucket/out" in line


def test_an_endpoint_that_is_dead(
    s3_endpoint: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """No server listens: every command prints one paragraph."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    config, url = tmp_path / "export.yaml", f"{URL}/dead"
    config.write_text(f"run: {run_dir}\nout: {url}\n")
    for argv in (
        *(["export", part, str(config)] for part in ("run", "plan")),
        *(["export", part, url] for part in ("status", "finalize", "gc")),
        ["verify", url],
    ):
        assert main(argv) in (FAILED, WRONG_USE), argv
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert (printed.out, line[:7]) == ("", "error: ")
        assert url in line
        assert "connect" in line.lower()
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["export", "run", str(config)]) == FAILED
    assert capsys.readouterr().err.startswith("error: ")
    config.write_text(f"run: {tmp_path}/none\nout: {url}\n")  # a mistake of all: told by the first
    assert main(["export", "run", str(config)]) == WRONG_USE
    assert capsys.readouterr().err == ""
    S3FileSystem.clear_instance_cache()
