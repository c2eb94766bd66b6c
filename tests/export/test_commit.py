"""The crash table: whatever a dead process left, the next one writes the same bytes.

Each state is made by doing the protocol's own steps and then nothing more, as SIGKILL would.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.common.files import write_atomic
from pipeline.export.command import begin
from pipeline.export.commit import Commit, commit, publish_commit, stage_rows
from pipeline.export.finalize import finalize
from pipeline.export.layout import PLAN, STATISTICS, SUCCESS, commit_path
from pipeline.export.prepare import Prepared
from pipeline.export.progress import Progress
from pipeline.export.run import Shards, Work, WorkerResult, run_worker
from pipeline.export.statistics import partial_of, to_json
from pipeline.export.work import encode_task
from pipeline.export.workers import Worker
from tests.export.world import make_config, run_export, tree


@pytest.fixture
def prepared(run_dir: Path, tmp_path: Path) -> Prepared:
    return begin(make_config(run_dir, tmp_path / "out"), Worker())[0]


def stage_task(prepared: Prepared, number: int) -> Commit:
    """Do step 1 of a task, and return the record that step 2 would create."""
    task = prepared.plan.tasks[number]
    with closing(prepared.work.read([task.shard])) as shards:
        rows, faults = encode_task(
            task.name,
            next(shards)[1],
            prepared.work.encoder,
            max_bad_fraction=0,
            on_rows=lambda _: None,
        )
    staged = stage_rows(prepared.export, task.name, rows, prepared.work.writers)
    return Commit(
        task=task.name,
        attempt=staged.attempt,
        keys=list(rows.keys),
        faults=[list(fault) for fault in faults],
        files=list(staged.files),
        statistics=to_json(partial_of(rows.latents, rows.valid)),
        process={},
    )


def root(prepared: Prepared) -> Path:
    return Path(prepared.export.root)


def do(prepared: Prepared, work: Work | None = None) -> WorkerResult:
    return run_worker(
        prepared.export,
        prepared.plan,
        work or prepared.work,
        worker=Worker(),
        should_stop=lambda: False,
        progress=Progress(prepared.export, prepared.plan, enabled=False),
    )


def do_all(prepared: Prepared) -> None:
    assert do(prepared) == WorkerResult()


def only_the_plan(prepared: Prepared) -> None:
    assert (root(prepared) / PLAN).exists()


def half_a_stage(prepared: Prepared) -> None:
    record = stage_task(prepared, 0)
    stage = root(prepared) / "_stage" / record.attempt
    (stage / "parquet.parquet").unlink()
    (stage / "tar.tar").write_bytes((stage / "tar.tar").read_bytes()[:1000])


def staged(prepared: Prepared) -> None:
    stage_task(prepared, 0)
    stage_task(prepared, 0)


def half_a_record(prepared: Prepared) -> None:
    path = root(prepared) / commit_path(stage_task(prepared, 0).task)
    path.parent.mkdir(exist_ok=True)
    path.with_name(path.name + ".tmp-0123456789ab").write_bytes(b'{"task": "sha')


def committed(prepared: Prepared) -> None:
    for number in (0, 5):
        assert commit(prepared.export, stage_task(prepared, number))


def half_published(prepared: Prepared) -> None:
    record = stage_task(prepared, 2)
    commit(prepared.export, record)
    final = root(prepared) / record.files[0].path
    final.parent.mkdir(parents=True)
    (root(prepared) / "_stage" / record.attempt / "tar.tar").rename(final)


def published(prepared: Prepared) -> None:
    record = stage_task(prepared, 2)
    commit(prepared.export, record)
    publish_commit(prepared.export, record)
    stage_task(prepared, 2)  # and somebody else's litter


def all_committed(prepared: Prepared) -> None:
    for number in range(len(prepared.plan.tasks)):
        commit(prepared.export, stage_task(prepared, number))


def half_a_root_file(prepared: Prepared) -> None:
    do_all(prepared)
    write_atomic(root(prepared) / "_run" / "manifest.json.0123456789ab", b"{")
    (root(prepared) / STATISTICS).write_text("stands for an older attempt")


def without_mark(prepared: Prepared) -> None:
    do_all(prepared)
    finalize(prepared.export, prepared.plan)
    (root(prepared) / SUCCESS).unlink()
    stage_task(prepared, 1)


def finished_with_litter(prepared: Prepared) -> None:
    do_all(prepared)
    finalize(prepared.export, prepared.plan)
    stage_task(prepared, 1)


STATES = (
    only_the_plan,
    half_a_stage,
    staged,
    half_a_record,
    committed,
    half_published,
    published,
    all_committed,
    half_a_root_file,
    without_mark,
    finished_with_litter,
)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_next_process_comes_to_the_same_bytes(
    prepared: Prepared, finished: Path, run_dir: Path, state: Callable[[Prepared], None]
):
    state(prepared)
    assert run_export(make_config(run_dir, root(prepared))) == 0
    assert tree(root(prepared)) == tree(finished)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_clock_that_jumps_changes_nothing(
    prepared: Prepared, finished: Path, run_dir: Path, state: Callable[[Prepared], None]
):
    """Files with modification times in the future, or long ago."""
    state(prepared)
    for place, (folder, _, names) in enumerate(os.walk(root(prepared))):
        for number, name in enumerate(names):
            stamp = 4_000_000_000 if (place + number) % 2 else 1
            os.utime(Path(folder, name), (stamp, stamp))
    assert run_export(make_config(run_dir, root(prepared))) == 0
    assert tree(root(prepared)) == tree(finished)


def read_commit(prepared: Prepared, task: str) -> Commit:
    return Commit.parse((root(prepared) / commit_path(task)).read_bytes())


def test_one_of_two_commits_wins(prepared: Prepared):
    first, second = stage_task(prepared, 0), stage_task(prepared, 0)
    assert commit(prepared.export, second)
    assert not commit(prepared.export, first)
    assert read_commit(prepared, first.task) == second


def test_loser_leaves_nothing(prepared: Prepared):
    """Another process commits the task while this one encodes it."""
    record = stage_task(prepared, 0)
    work = prepared.work

    def read(shards: Iterable[int]) -> Shards:
        for shard, batches in work.read(shards):
            if shard == 0:
                commit(prepared.export, record)
            yield shard, batches

    assert do(prepared, replace(work, read=read)) == WorkerResult()
    assert read_commit(prepared, record.task) == record
    assert [path.name for path in (root(prepared) / "_stage").iterdir()] == [record.attempt]


def test_committed_task_is_not_done_again(prepared: Prepared):
    task = prepared.plan.tasks[0]
    commit(prepared.export, stage_task(prepared, 0))
    do_all(prepared)
    assert read_commit(prepared, task.name).process == {}


def test_stage_removed_by_a_finished_export_is_no_error(prepared: Prepared):
    """A process does a task again while another finishes and removes `_stage/`."""
    record = stage_task(prepared, 0)

    class Vanishing(type(prepared.work.writers[0])):
        def write(self, path, rows):
            if rows.shard == record.task:
                commit(prepared.export, record)
                shutil.rmtree(path.parent)
            super().write(path, rows)

    assert do(prepared, replace(prepared.work, writers=(Vanishing(),))) == WorkerResult()


def test_a_stage_that_somebody_removed_is_written_again(prepared: Prepared):
    times = []

    class Vanishing(type(prepared.work.writers[0])):
        def write(self, path, rows):
            times.append(rows.shard)
            if len(times) == 2:
                shutil.rmtree(path.parent)
            super().write(path, rows)

    assert do(prepared, replace(prepared.work, writers=(Vanishing(),))) == WorkerResult()
    assert len(times) == len(prepared.plan.tasks) + 1


def test_published_file_that_vanished_is_an_error(prepared: Prepared):
    record = stage_task(prepared, 0)
    commit(prepared.export, record)
    publish_commit(prepared.export, record)
    publish_commit(prepared.export, record)  # harmless
    (root(prepared) / record.files[0].path).unlink()
    with pytest.raises(UserError, match="was committed but is gone"):
        publish_commit(prepared.export, record)


def test_a_damaged_file_is_replaced_when_its_commit_record_is_removed(
    prepared: Prepared, finished: Path
):
    do_all(prepared)
    finalize(prepared.export, prepared.plan)
    record = read_commit(prepared, prepared.plan.tasks[3].name)
    (root(prepared) / record.files[0].path).write_bytes(b"rotten")
    (root(prepared) / commit_path(record.task)).unlink()
    do_all(prepared)
    assert tree(root(prepared)) == tree(finished)


def test_shards_in_folders_keep_their_folders(prepared: Prepared):
    record = stage_task(prepared, 0)
    files = [
        type(file)(file.path.replace("shard-", "train/shard-"), file.bytes, file.sha256)
        for file in record.files
    ]
    nested = type(record)(**vars(record) | {"task": f"train/{record.task}", "files": files})
    assert commit(prepared.export, nested)
    assert prepared.export.committed([nested.task, "train"]) == {nested.task}
    publish_commit(prepared.export, nested)
    assert (root(prepared) / "data/tar/train/shard-000000.tar").exists()
