"""Failures: counted if the task is the cause, reported, and never half-written."""

import errno
import itertools
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common import strict
from pipeline.common.errors import DONE, FAILED, WRONG_USE, StoreError, UserError
from pipeline.data.index import build_index
from pipeline.data.storage import ShardReadError
from pipeline.export.__main__ import main
from pipeline.export.command import begin, work_through
from pipeline.export.finalize import finalize
from pipeline.export.layout import flat_name
from pipeline.export.prepare import Prepared
from pipeline.export.run import Shards
from pipeline.export.status import export_status
from pipeline.export.verify.levels import verify_export
from pipeline.export.workers import Worker
from tests.export.world import (
    NUM_SHARDS,
    SHARD_ROWS,
    SPLIT,
    damage_shard,
    make_config,
    make_data,
    run_export,
    tree,
)

BAD = ("shard-000000", "shard-000003")


@pytest.fixture
def bad_data(tmp_path: Path) -> Path:
    """All pictures of two of five shards are damaged."""
    data = make_data(tmp_path / "data", shards=5)
    for shard in BAD:
        damage_shard(data, f"{shard}.tar")
    build_index(data, split=SPLIT)
    return data


def committed(out: Path) -> set[str]:
    return {path.stem for path in (out / "_run/commits").glob("*.json")}


def failing(prepared: Prepared, error: Callable[[int], Exception | None]) -> Prepared:
    """The same export, in which reading some shards raises."""

    def read(shards: Iterable[int]) -> Shards:
        for shard, batches in prepared.work.read(shards):
            found = error(shard)
            yield shard, batches if found is None else _raising(found)

    return replace(prepared, work=replace(prepared.work, read=read))


def _raising(error: Exception):
    raise error
    yield


def go(prepared: Prepared) -> int:
    return work_through(prepared, Worker(), lambda: False)


def test_a_task_with_too_many_bad_rows_fails_and_the_others_are_done(
    run_dir: Path, bad_data: Path, tmp_path: Path
):
    out = tmp_path / "out"
    settings = {"data": {"path": str(bad_data)}}
    config = make_config(run_dir, out, **settings)
    told = (
        r"2 of 5 tasks have failed, so the export is not finished \(3 are committed\)\. "
        r"The first, shard-000000: 16 of the 16 rows .* max_bad_fraction = 0\.1 .*--retry-failed"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            run_export(config)
        assert committed(out) == {"shard-000001", "shard-000002", "shard-000004"}
        assert not (out / "_SUCCESS").exists()
        assert len(list((out / "_run/failures").iterdir())) == 2  # the second time nobody tried
    status = export_status(str(out))
    assert (status.committed_tasks, status.committed_rows, status.failed_rows) == (3, 48, 0)
    assert list(status.quarantined) == list(BAD)
    assert "16 of the 16 rows" in status.quarantined[BAD[1]]
    patient = make_config(run_dir, out, **settings, max_bad_fraction=1)
    assert run_export(patient, retry_failed=True) == DONE
    manifest = json.loads((out / "manifest.json").read_bytes())
    for task in manifest["tasks"]:  # n_in = n_out + n_failed
        assert task["rows"] == SHARD_ROWS
        assert len(task["faults"]) == (SHARD_ROWS if task["name"] in BAD else 0)
    once = make_config(run_dir, tmp_path / "once", **settings, max_bad_fraction=1)
    assert run_export(once) == DONE
    assert tree(out) == tree(tmp_path / "once")


def test_unexpected_errors_count_over_starts_until_the_task_fails(
    run_dir: Path, finished: Path, tmp_path: Path
):
    prepared, _ = begin(make_config(run_dir, tmp_path / "out"), Worker())
    tries = []

    def error(shard: int) -> Exception | None:
        tries.append(shard)
        return RuntimeError("odd") if shard == 4 else None

    for attempts in (3, 3):
        tries.clear()
        before = len(list((tmp_path / "out").glob("_run/failures/*")))
        with pytest.raises((RuntimeError, UserError), match="odd"):
            go(failing(prepared, error))
        assert len(list((tmp_path / "out/_run/failures").iterdir())) == attempts
        assert tries.count(4) == attempts - before
    record = json.loads(next((tmp_path / "out/_run/failures").iterdir()).read_bytes())
    assert record["reason"] == "RuntimeError: odd"
    assert "in _raising" in record["traceback"]
    with pytest.raises(UserError, match="1 of 10 tasks .* shard-000004: RuntimeError: odd"):
        go(prepared)
    assert run_export(make_config(run_dir, tmp_path / "out"), retry_failed=True) == DONE
    assert tree(tmp_path / "out") == tree(finished)


def test_only_failures_in_a_row_end_a_worker(run_dir: Path, tmp_path: Path):
    """Between two failures a task succeeds, which is written while the next one fails."""
    prepared, _ = begin(make_config(run_dir, tmp_path / "out"), Worker())
    lost = {0, 2, 4}
    broken = failing(prepared, lambda shard: ShardReadError("gone") if shard in lost else None)
    with pytest.raises(StoreError, match="3 of 10 tasks are not done"):
        go(broken)
    assert committed(tmp_path / "out") == {
        f"shard-{shard:06d}" for shard in range(NUM_SHARDS) if shard not in lost
    }


def test_any_worker_retries_failed_tasks(run_dir: Path, bad_data: Path, tmp_path: Path):
    config = make_config(run_dir, tmp_path / "out", data={"path": str(bad_data)})
    (tmp_path / "export.yaml").write_text(strict.dump(config))
    argv = [str(tmp_path / "export.yaml"), "--worker", "1/2"]
    assert main(argv) == WRONG_USE
    assert main([*argv, "max_bad_fraction=1"]) == WRONG_USE
    assert main([*argv, "max_bad_fraction=1", "--retry-failed"]) == DONE


def test_names_that_a_file_system_only_just_holds(run_dir: Path, tmp_path: Path):
    """Names of records and stages begin with the name of the shard."""
    data = make_data(tmp_path / "data", shards=2)
    names = ["\u4e2d" * 60 + end for end in "ab"]
    for number, name in enumerate(names):
        (data / f"shard-{number:06d}.tar").rename(data / f"{name}.tar")
    build_index(data, split=SPLIT)
    assert len(set(map(flat_name, names))) == 2
    config = make_config(run_dir, tmp_path / "out", data={"path": str(data)})
    assert run_export(config) == DONE
    assert verify_export(tmp_path / "out", source=data).problems == []
    assert export_status(tmp_path / "out").committed_tasks == 2


def test_an_error_that_goes_away_is_tried_again_in_the_same_start(
    run_dir: Path, finished: Path, tmp_path: Path
):
    prepared, _ = begin(make_config(run_dir, tmp_path / "out"), Worker())
    tries = itertools.count()
    odd = failing(
        prepared, lambda shard: ValueError("x") if shard == 4 and not next(tries) else None
    )
    assert go(odd) == DONE
    assert tree(tmp_path / "out") == tree(finished)


def test_reading_that_fails_is_never_counted(run_dir: Path, finished: Path, tmp_path: Path):
    out = tmp_path / "out"
    prepared, _ = begin(make_config(run_dir, out), Worker())
    broken = failing(prepared, lambda shard: ShardReadError("no route") if shard == 4 else None)
    for _ in range(4):
        with pytest.raises(OSError, match=r"1 of 10 tasks are not done.* shard-000004: no route"):
            go(broken)
    assert len(committed(out)) == NUM_SHARDS - 1
    assert not (out / "_run/failures").exists()
    assert go(prepared) == DONE
    assert tree(out) == tree(finished)


def test_three_in_a_row_end_the_worker(run_dir: Path, tmp_path: Path):
    """A dead device, or a store that is down, must not make every task fail."""
    prepared, _ = begin(make_config(run_dir, tmp_path), Worker())
    with pytest.raises(RuntimeError, match="sick"):
        go(failing(prepared, lambda _: RuntimeError("sick")))
    assert 3 <= len(list((tmp_path / "_run/failures").iterdir())) <= 4
    assert go(prepared) == DONE


def test_a_listing_that_fails_ends_the_worker_and_is_no_tasks_fault(
    run_dir: Path, finished: Path, tmp_path: Path
):
    prepared, _ = begin(make_config(run_dir, tmp_path), Worker())
    store, asked = prepared.export.store, itertools.count()

    class Flaky(type(store)):
        def exists(self, name: str) -> bool:
            if name.startswith("_run/commits/") and next(asked) == 4:
                raise StoreError("the network is gone")
            return super().exists(name)

    flaky = replace(prepared, export=type(prepared.export)(Flaky(store.root)))
    with pytest.raises(StoreError, match="the network is gone"):
        go(flaky)
    assert 2 <= len(committed(tmp_path)) < NUM_SHARDS
    assert not (tmp_path / "_run/failures").exists()
    assert go(prepared) == DONE
    assert tree(tmp_path) == tree(finished)


def test_three_blips_of_reading_in_a_row_end_the_worker_with_a_word(
    run_dir: Path, finished: Path, tmp_path: Path
):
    prepared, _ = begin(make_config(run_dir, tmp_path), Worker())
    broken = failing(prepared, lambda n: ShardReadError("blip") if n in (3, 4, 5) else None)
    with pytest.raises(
        StoreError, match=r"[67] of 10 tasks are not done\. 3 failures in a row .* [34] task"
    ):
        go(broken)
    assert go(prepared) == DONE
    assert tree(tmp_path) == tree(finished)


def test_any_number_of_verdicts_keeps_nobody_from_the_other_tasks(run_dir: Path, tmp_path: Path):
    data = make_data(tmp_path / "data", shards=7)
    for number in (1, 2, 3, 4):
        damage_shard(data, f"shard-{number:06d}.tar")
    build_index(data, split=SPLIT)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"4 of 7 tasks have failed.*\(3 are committed\)\. The"):
        run_export(make_config(run_dir, out, data={"path": str(data)}))
    assert committed(out) == {"shard-000000", "shard-000005", "shard-000006"}


def test_latents_of_an_export_whose_plan_is_gone_are_not_taken_for_new_ones(
    run_dir: Path, tmp_path: Path
):
    assert run_export(make_config(run_dir, tmp_path)) == DONE
    shutil.rmtree(tmp_path / "_run")
    before = tree(tmp_path)
    for name in ("_SUCCESS", "manifest.json"):
        with pytest.raises(
            UserError, match=r"holds data/\w+/shard-000000.* but no _run/plan\.json"
        ):
            run_export(make_config(run_dir, tmp_path, weights="raw"))
        (tmp_path / name).unlink()
        del before[name]
    assert tree(tmp_path) == before


def test_a_missing_shard_is_named_and_the_rest_is_done(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = make_data(tmp_path / "data", shards=4)
    shard = data / "shard-000002.tar"
    config = tmp_path / "export.yaml"
    config.write_text(strict.dump(make_config(run_dir, tmp_path / "out", data={"path": str(data)})))
    prepared, _ = begin(strict.load(type(make_config(run_dir, tmp_path)), config, []), Worker())
    shard.rename(tmp_path / "away.tar")
    with pytest.raises(OSError, match="shard-000002.tar is missing or has changed"):
        go(prepared)
    assert len(committed(tmp_path / "out")) == 3
    assert main([str(config)]) in (FAILED, WRONG_USE)
    assert "shard-000002.tar" in capsys.readouterr().err
    (tmp_path / "away.tar").rename(shard)
    assert main([str(config)]) == DONE


@pytest.mark.fault
def test_a_disk_that_fills_up_at_any_write_costs_nothing_that_was_committed(
    run_dir: Path, finished: Path, tmp_path: Path, small_disk: Callable
):
    """With more free space each start gets further; all but the last report the full disk."""
    disk = small_disk("16k", "nr_inodes=400")
    config = tmp_path / "export.yaml"
    config.write_text(strict.dump(make_config(run_dir, disk / "out")))
    generator = random.Random(7)
    size, done, refusals = 16, 0, []
    while True:
        code = main([str(config)])
        now = len(committed(disk / "out")) if (disk / "out/_run/commits").exists() else 0
        assert now >= done
        done = now
        if code == DONE:
            break
        assert code == WRONG_USE
        refusals.append(size)
        for stage in (disk / "out").glob("_stage/*"):
            assert not list(stage.iterdir()), "an attempt left its files on the full disk"
        size += generator.choice([4, 8, 12, 20])
        small_disk(f"{size}k", "nr_inodes=400")
    assert len(refusals) > 5
    assert tree(disk / "out") == tree(finished)


def test_no_space_is_one_paragraph(
    run_dir: Path, tmp_path: Path, small_disk: Callable, capsys: pytest.CaptureFixture[str]
):
    disk = small_disk("64k")
    config = tmp_path / "export.yaml"
    config.write_text(strict.dump(make_config(run_dir, disk / "out")))
    assert main([str(config)]) == WRONG_USE
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(rf"error: .*{disk}.*No space left on device.*give the same command", error)


@pytest.mark.parametrize("reading", [OSError, KeyError])
def test_a_reader_that_dies_leaves_no_thread_and_no_stage(
    run_dir: Path, tmp_path: Path, reading: type[Exception]
):
    prepared, _ = begin(make_config(run_dir, tmp_path), Worker())
    with pytest.raises((reading, UserError, OSError)):
        go(failing(prepared, lambda _: reading("x")))
    assert not list(tmp_path.glob("_stage/*"))
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("rows-", "export-"))]


@pytest.mark.fault
def test_a_disk_that_fills_up_at_any_file_of_the_end_leaves_no_mark(
    run_dir: Path, finished: Path, tmp_path: Path, small_disk: Callable
):
    """With one more page each time: statistics fit, then index, then manifest, then _SUCCESS."""
    disk = small_disk("16m")
    out = disk / "out"
    prepared, _ = begin(make_config(run_dir, out), Worker())
    assert go(prepared) == DONE
    ends = ("_SUCCESS", "manifest.json", "keys.parquet", "latent_stats.json")
    left: list[int] = []  # files of the end that were there at each refusal
    for pages in itertools.count():
        for name in ends:
            (out / name).unlink(missing_ok=True)
        fill_up(disk, pages)
        try:
            finalize(prepared.export, prepared.plan)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
        assert not (out / "_SUCCESS").exists()
        assert not [path for path in out.rglob("*.tmp-*") if path.is_file()]
        left.append(sum((out / name).exists() for name in ends))
    assert left == sorted(left)
    assert set(left) == {0, 1, 2, 3}
    assert tree(out) == tree(finished)


def fill_up(disk: Path, pages: int) -> None:
    """Leave this many pages of a disk free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    status = os.statvfs(disk)
    free = status.f_bavail * status.f_frsize - pages * os.sysconf("SC_PAGE_SIZE")
    filler.write_bytes(bytes(free))
