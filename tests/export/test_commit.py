"""The crash table: whatever a dead process left behind, the next one comes to the same bytes.

Each state is made by doing the protocol's own steps and then nothing more, as SIGKILL would.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.export.__main__ import begin
from pipeline.export.commit import Commit, commit, publish_commit, stage_rows
from pipeline.export.finalize import finalize
from pipeline.export.layout import ExportDir
from pipeline.export.prepare import Prepared
from pipeline.export.progress import Progress
from pipeline.export.run import do_task, keys_digest, run_worker
from pipeline.export.statistics import partial_of, to_json
from pipeline.export.work import encode_task
from pipeline.export.workers import Worker
from pipeline.files import write_atomic
from tests.export.world import make_config, run_export, tree


@pytest.fixture
def prepared(run_dir: Path, tmp_path: Path) -> Prepared:
    return begin(make_config(run_dir, tmp_path / "out"), Worker())


def stage_task(prepared: Prepared, number: int) -> Commit:
    """Do step 1 of a task, and return the record that step 2 would create."""
    task = prepared.plan.tasks[number]
    rows, faults = encode_task(
        task.name,
        prepared.work.batches(task),
        prepared.work.encoder,
        max_bad_fraction=0,
        on_rows=lambda _: None,
    )
    staged = stage_rows(prepared.export, task.name, rows, prepared.work.writers)
    return Commit(
        task=task.name,
        attempt=staged.directory.name,
        rows=len(rows),
        keys_sha256=keys_digest(rows.keys),
        faults=[list(fault) for fault in faults],
        files=list(staged.files),
        statistics=to_json(partial_of(rows.latents, rows.valid)),
        process={},
    )


def do_all(prepared: Prepared) -> None:
    export, plan = prepared.export, prepared.plan
    progress = Progress(export, plan, enabled=False)
    assert run_worker(
        export,
        plan,
        prepared.work,
        worker=Worker(),
        should_stop=lambda: False,
        progress=progress,
    )


def only_the_plan(prepared: Prepared) -> None:
    assert prepared.export.plan.exists()


def half_a_stage(prepared: Prepared) -> None:
    record = stage_task(prepared, 0)
    stage = prepared.export.stage / record.attempt
    (stage / "parquet.parquet").unlink()
    (stage / "tar.tar").write_bytes((stage / "tar.tar").read_bytes()[:1000])


def staged(prepared: Prepared) -> None:
    stage_task(prepared, 0)
    stage_task(prepared, 0)


def half_a_record(prepared: Prepared) -> None:
    record = stage_task(prepared, 0)
    path = prepared.export.commit(record.task)
    path.with_name(path.name + ".tmp-0123456789ab").write_bytes(b'{"task": "sha')


def committed(prepared: Prepared) -> None:
    for number in (0, 5):
        assert commit(prepared.export, stage_task(prepared, number))


def half_published(prepared: Prepared) -> None:
    record = stage_task(prepared, 2)
    commit(prepared.export, record)
    first = record.files[0]
    final = prepared.export.root / first.path
    final.parent.mkdir(parents=True)
    (prepared.export.stage / record.attempt / "tar.tar").rename(final)


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
    write_atomic(prepared.export.root / "_run" / "manifest.json.0123456789ab", b"{")
    prepared.export.statistics.write_text("stands for an older attempt")


def without_mark(prepared: Prepared) -> None:
    do_all(prepared)
    finalize(prepared.export, prepared.plan, prepared.keys_of)
    prepared.export.success.unlink()
    stage_task(prepared, 1)


def finished_with_litter(prepared: Prepared) -> None:
    do_all(prepared)
    finalize(prepared.export, prepared.plan, prepared.keys_of)
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
    assert run_export(make_config(run_dir, prepared.export.root)) == 0
    assert tree(prepared.export.root) == tree(finished)


def test_one_of_two_commits_wins(prepared: Prepared):
    first, second = stage_task(prepared, 0), stage_task(prepared, 0)
    assert commit(prepared.export, second)
    assert not commit(prepared.export, first)
    assert Commit.read(prepared.export.commit(first.task)) == second


def test_loser_leaves_nothing(prepared: Prepared):
    task = prepared.plan.tasks[0]
    record = stage_task(prepared, 0)
    commit(prepared.export, record)
    progress = Progress(prepared.export, prepared.plan, enabled=False)
    assert not do_task(prepared.export, task, prepared.work, progress)
    assert [path.name for path in prepared.export.stage.iterdir()] == [record.attempt]


def test_committed_task_is_not_done_again(prepared: Prepared):
    task = prepared.plan.tasks[0]
    commit(prepared.export, stage_task(prepared, 0))
    do_all(prepared)
    assert Commit.read(prepared.export.commit(task.name)).process == {}


def test_stage_removed_by_a_finished_export_is_no_error(
    prepared: Prepared, finished: Path, tmp_path: Path
):
    """A process does a task again while another finishes and removes `_stage/`."""
    do_all(prepared)

    class Vanishing(type(prepared.work.writers[0])):
        def write(self, path, rows):
            shutil.rmtree(prepared.export.stage)
            super().write(path, rows)

    slow = type(prepared.work)(
        prepared.work.batches, prepared.work.encoder, (Vanishing(),), max_bad_fraction=0
    )
    progress = Progress(prepared.export, prepared.plan, enabled=False)
    assert not do_task(prepared.export, prepared.plan.tasks[0], slow, progress)
    prepared.export.commit(prepared.plan.tasks[0].name).unlink()
    with pytest.raises(FileNotFoundError):
        do_task(prepared.export, prepared.plan.tasks[0], slow, progress)


def test_published_file_that_vanished_is_an_error(prepared: Prepared):
    record = stage_task(prepared, 0)
    commit(prepared.export, record)
    publish_commit(prepared.export, record)
    publish_commit(prepared.export, record)  # harmless
    (prepared.export.root / record.files[0].path).unlink()
    with pytest.raises(RuntimeError, match="was committed but is gone"):
        publish_commit(prepared.export, record)


def test_shards_in_folders_keep_their_folders(prepared: Prepared):
    record = stage_task(prepared, 0)
    files = [
        type(file)(file.path.replace("shard-", "train/shard-"), file.bytes, file.sha256)
        for file in record.files
    ]
    nested = type(record)(**vars(record) | {"task": f"train/{record.task}", "files": files})
    export = ExportDir(prepared.export.root)
    assert commit(export, nested)
    assert export.committed([nested.task, "train"]) == {nested.task}
    publish_commit(export, nested)
    assert (export.root / "data/tar/train/shard-000000.tar").exists()
