"""status, gc and finalize from the files alone, in every state of an export."""

import shutil
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.data.index import build_index
from pipeline.export.command import begin
from pipeline.export.commit import commit, publish_commit
from pipeline.export.prepare import Prepared
from pipeline.export.status import collect_garbage, export_status, finalize_export
from pipeline.export.workers import Worker
from tests.export.test_commit import do_all, half_a_stage, stage_task
from tests.export.world import (
    NUM_SHARDS,
    SHARD_ROWS,
    SPLIT,
    damage_sample,
    damage_shard,
    make_config,
    make_data,
    run_export,
    tree,
)

ROWS = NUM_SHARDS * SHARD_ROWS


@pytest.fixture
def prepared(run_dir: Path, tmp_path: Path) -> Prepared:
    return begin(make_config(run_dir, tmp_path / "out"), Worker())[0]


def snapshot(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}


def attempts(out: Path) -> set[str]:
    return {path.parent.name for path in out.glob("_stage/*/*")}


def do_task(prepared: Prepared, number: int) -> None:
    record = stage_task(prepared, number)
    record.process["seconds"] = 2.0
    assert commit(prepared.export, record)
    publish_commit(prepared.export, record)


def test_only_the_plan(prepared: Prepared, tmp_path: Path):
    before = snapshot(tmp_path / "out")
    status = export_status(str(tmp_path / "out"))
    assert (status.finished, status.tasks, status.rows) == (False, NUM_SHARDS, ROWS)
    assert (status.committed_tasks, status.committed_rows, status.committed_bytes) == (0, 0, 0)
    assert (status.failed_rows, status.failed_attempts, status.quarantined) == (0, 0, {})
    assert (status.staged_tasks, status.rows_per_process_second) == ([], None)
    assert snapshot(tmp_path / "out") == before


def test_half_done(prepared: Prepared, tmp_path: Path):
    out = tmp_path / "out"
    do_task(prepared, 1)
    do_task(prepared, 6)
    half_a_stage(prepared)
    (name,) = {name.rpartition(".")[0] for name in attempts(out)}
    before = snapshot(out)
    status = export_status(str(out))
    assert (status.finished, status.committed_tasks) == (False, 2)
    assert (status.committed_rows, status.failed_rows) == (2 * SHARD_ROWS, 0)
    sizes = [path.stat().st_size for path in (out / "data").rglob("*") if path.is_file()]
    assert status.committed_bytes == sum(sizes)
    assert status.staged_tasks == [name]
    assert status.rows_per_process_second == 2 * SHARD_ROWS / 4
    assert snapshot(out) == before


def test_failed_tasks_and_failed_rows(run_dir: Path, tmp_path: Path):
    data = make_data(tmp_path / "data", shards=3)
    damage_sample(data, "shard-000000.tar", 3)
    damage_shard(data, "shard-000001.tar")
    build_index(data, split=SPLIT)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 of 3 tasks have failed"):
        run_export(make_config(run_dir, out, data={"path": str(data)}))
    status = export_status(str(out))
    assert (status.finished, status.tasks, status.committed_tasks) == (False, 3, 2)
    assert (status.committed_rows, status.failed_rows) == (2 * SHARD_ROWS, 1)
    assert (status.failed_attempts, list(status.quarantined)) == (1, ["shard-000001"])
    assert "16 of the 16 rows of shard-000001 failed" in status.quarantined["shard-000001"]
    with pytest.raises(UserError, match="1 of its 3 tasks are not committed, such as shard-000001"):
        finalize_export(str(out))


def test_finished(finished: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    before = snapshot(out)
    status = export_status(str(out))
    assert (status.finished, status.committed_tasks, status.committed_rows) == (
        True,
        NUM_SHARDS,
        ROWS,
    )
    sizes = [path.stat().st_size for path in (out / "data").rglob("*") if path.is_file()]
    assert status.committed_bytes == sum(sizes)
    assert status.staged_tasks == []
    report = finalize_export(str(out))
    assert (report.tasks, report.rows) == (NUM_SHARDS, ROWS)
    garbage = collect_garbage(str(out))
    assert (garbage.removed_files, garbage.removed_bytes) == (0, 0)
    assert snapshot(out) == before


def test_no_export(tmp_path: Path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "none", tmp_path / "file"):
        before = snapshot(tmp_path)
        for look in (export_status, finalize_export, collect_garbage):
            with pytest.raises(UserError, match=f"{out} holds no export"):
                look(str(out))
        assert snapshot(tmp_path) == before


def test_gc_removes_the_stages_of_committed_tasks_alone(prepared: Prepared, tmp_path: Path):
    out = tmp_path / "out"
    do_task(prepared, 0)
    litter = [stage_task(prepared, 0) for _ in range(2)]
    unpublished, staged = stage_task(prepared, 1), stage_task(prepared, 2)
    assert commit(prepared.export, unpublished)
    report = collect_garbage(str(out))
    assert attempts(out) == {staged.attempt}
    files = [file for record in litter for file in record.files]
    assert report.removed_files == len(files)
    assert report.removed_bytes == sum(file.bytes for file in files)
    for file in unpublished.files:
        assert (out / file.path).stat().st_size == file.bytes
    assert collect_garbage(str(out)).removed_files == 0
    assert attempts(out) == {staged.attempt}


@pytest.mark.parametrize("published", [True, False])
def test_finalize_needs_neither_model_nor_data(
    prepared: Prepared, finished: Path, tmp_path: Path, published: bool
):
    """Its only argument is the directory of the export."""
    out = tmp_path / "out"
    if published:
        do_all(prepared)
    else:
        for number in range(NUM_SHARDS):
            assert commit(prepared.export, stage_task(prepared, number))
    finalize_export(str(out))
    assert tree(out) == tree(finished)


def test_finalize_refuses_all_but_a_whole_export(prepared: Prepared, tmp_path: Path):
    out = tmp_path / "out"
    for number in range(NUM_SHARDS - 1):
        do_task(prepared, number)
    committed_but_one = tree(out)
    told = f"1 of its 10 tasks are not committed, such as shard-{NUM_SHARDS - 1:06d}"
    with pytest.raises(UserError, match=told):
        finalize_export(str(out))
    assert tree(out) == committed_but_one
    do_task(prepared, NUM_SHARDS - 1)
    assert finalize_export(str(out)).rows == ROWS
    assert export_status(str(out)).finished
