"""Lost responses, wrong listings, and all kinds of processes on one export at once."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import boto3
import fsspec
import psutil
import pytest
from botocore.exceptions import ConnectionClosedError
from s3fs import S3FileSystem

from pipeline.common import strict
from pipeline.common.errors import DONE, PREEMPTED, StoreError, UserError
from pipeline.common.files import create_exclusive
from pipeline.data.storage.opening import open_writable
from pipeline.data.storage.writable_local import LocalWritable
from pipeline.export.command import begin, work_through
from pipeline.export.layout import COMMITS, ExportDir
from pipeline.export.status import collect_garbage, export_status, finalize_export
from pipeline.export.verify.levels import verify_export
from pipeline.export.workers import Worker
from tests.data.storage.conftest import BUCKET, s3_endpoint
from tests.export.world import NUM_SHARDS, make_config, run_export, tree
from tests.processes import Processes

__all__ = ["s3_endpoint"]  # a fixture


class LostAnswers(LocalWritable):
    """A store that does what is requested, and then reports a failure."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.lost: list[str] = []

    def create(self, name: str, content: bytes) -> bool:
        done = super().create(name, content)
        if done and name.startswith(COMMITS):
            self.lost.append(name)
            raise StoreError(f"{name}: the connection broke")
        return done


def test_a_commit_whose_answer_is_lost_is_a_commit(run_dir: Path, finished: Path, tmp_path: Path):
    """Its stage is kept, nobody does the task again, and `finalize` publishes it."""
    prepared, _ = begin(make_config(run_dir, tmp_path), Worker())
    store = LostAnswers(str(tmp_path))
    prepared = replace(prepared, export=ExportDir(store))
    codes = []
    for _ in range(4):  # three failures in a row end a worker
        try:
            codes.append(work_through(prepared, Worker(), lambda: False))
        except OSError as error:
            assert "the connection broke" in str(error)  # noqa: PT017
    assert codes[-1:] == [DONE]
    assert len(store.lost) == len(prepared.plan.tasks)
    assert tree(tmp_path) == tree(finished)


def test_s3_creates_once_though_its_first_answer_is_lost(s3_endpoint: str):
    """The library retries, and its own first request makes the second one fail."""
    S3FileSystem.clear_instance_cache()
    store = open_writable(f"s3://{BUCKET}/lost")
    answers = []

    def lose_the_first(**_):
        answers.append(1)
        if len(answers) == 1:
            raise ConnectionClosedError(endpoint_url=store.root)

    store._files.call_s3("list_buckets")  # connects
    store._files.s3.meta.events.register("after-call.s3.PutObject", lose_the_first)
    assert store.create("a.json", b"mine")
    assert len(answers) == 2
    assert not store.create("a.json", b"another's")
    assert store.read("a.json") == b"mine"
    S3FileSystem.clear_instance_cache()


def test_a_link_whose_answer_is_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS retries when no response comes, and gets the error that the name exists."""
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert create_exclusive(tmp_path / "a", b"mine")
    assert not create_exclusive(tmp_path / "a", b"mine")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_store_that_does_not_answer_is_not_a_missing_file(monkeypatch: pytest.MonkeyPatch):
    """Otherwise a committed file would count as missing."""
    store = open_writable("memory://unreachable")
    store.put("a", b"x")
    assert [store.exists(name) for name in ("a", "b")] == [True, False]

    def broken(self: object, path: str, **_: object) -> None:
        raise ConnectionError(path)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", broken)
    with pytest.raises(StoreError, match="unreachable/a cannot be read"):
        store.exists("a")


def many_hands(out: str, run: Callable[[], int]) -> None:
    """Three workers, while others clean up, finish and look as often as they can."""
    errors: list[BaseException] = []
    at_work = threading.Event()

    def watched(do: Callable[[], None]) -> Callable[[], None]:
        def loop() -> None:
            try:
                do()
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

        return loop

    def work() -> None:
        assert run() == DONE

    def meddle() -> None:
        while not at_work.is_set():
            collect_garbage(out)
            export_status(out)
            try:
                finalize_export(out)
            except UserError as error:
                assert "are not committed" in str(error)  # noqa: PT017

    workers = [threading.Thread(target=watched(work)) for _ in range(3)]
    meddlers = [threading.Thread(target=watched(meddle)) for _ in range(2)]
    for thread in [*workers, *meddlers]:
        thread.start()
    for thread in workers:
        thread.join()
    at_work.set()
    for thread in meddlers:
        thread.join()
    if errors:
        raise errors[0]


def test_gc_status_and_finalize_while_others_work(run_dir: Path, finished: Path, tmp_path: Path):
    for turn in range(4):
        out = tmp_path / str(turn)
        config = make_config(run_dir, out)
        begin(config, Worker())
        many_hands(str(out), lambda config=config: run_export(config))
        assert tree(out) == tree(finished)


def names_in(prefix: str) -> list[str]:
    """The keys of the bucket below a prefix."""
    return [item.key for item in boto3.resource("s3").Bucket(BUCKET).objects.filter(Prefix=prefix)]


@pytest.mark.slow
def test_gc_status_and_finalize_on_s3_while_others_work(
    s3_endpoint: str, run_dir: Path, finished: Path
):
    url = f"s3://{BUCKET}/hands"
    config = make_config(run_dir, Path("none")).model_copy(update={"out": url})
    begin(config, Worker())
    many_hands(url, lambda: run_export(config))
    assert verify_export(url).problems == []
    names = {name.removeprefix("hands/") for name in names_in("hands/")}
    assert {name for name in names if not name.startswith("_run/")} == set(tree(finished))


@pytest.mark.fault
def test_sigterm_amid_uploads_ends_with_them(
    s3_endpoint: str,
    run_dir: Path,
    finished: Path,
    tmp_path: Path,
    start_processes: Callable[..., Processes],
):
    """Tasks in progress are uploaded, committed and published; the same command continues."""
    url = f"s3://{BUCKET}/term"
    config = tmp_path / "export.yaml"
    config.write_text(strict.dump(make_config(run_dir, tmp_path).model_copy(update={"out": url})))
    running = start_processes("pipeline.export", None, config)
    process = psutil.Process(running.pid)
    # It stands still while the bucket is looked at, however slow that is here.
    while True:
        process.suspend()
        if names_in("term/_stage/") or names_in(f"term/{COMMITS}/"):
            break
        process.resume()
        time.sleep(0.02)
        assert running.running, running.output
    process.terminate()
    process.resume()
    stopped = running.wait()
    assert stopped.code == PREEMPTED, stopped.output
    assert not names_in("term/_stage/")
    assert not names_in("term/_SUCCESS")
    commits, tars = names_in(f"term/{COMMITS}/"), names_in("term/data/tar/")
    assert 0 < len(commits) == len(tars) < NUM_SHARDS
    resumed = start_processes("pipeline.export", None, config).wait()
    assert resumed.code == DONE, resumed.output
    assert verify_export(url).problems == []
    names = {name.removeprefix("term/") for name in names_in("term/")}
    assert {name for name in names if not name.startswith("_run/")} == set(tree(finished))
