"""Which checkpoints are kept: the newest, one per interval, the best; and early stopping."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoints.folder import list_checkpoints, read_state, save_checkpoint
from pipeline.checkpoints.retention import BestMetric, Keep, retain
from pipeline.common.errors import UserError
from pipeline.train import train
from pipeline.training.loading import load_run
from tests.checkpoints.test_folder import STATE, some_tensors
from tests.config.runs import World, write_shards


def write(directory: Path, *steps: int) -> None:
    """Checkpoints of batches of ten."""
    for step in steps:
        state = replace(STATE, step=step, position=10 * step)
        save_checkpoint(directory, state, some_tensors(step))


def left(directory: Path) -> list[int]:
    return sorted(read_state(path).step for path in list_checkpoints(directory))


BY_LOSS = Keep(best=BestMetric(metric="eval/loss"))


@pytest.mark.parametrize(
    ("keep", "values", "expected"),
    [
        (Keep(), {}, [11, 12]),
        (Keep(latest=4), {}, [9, 10, 11, 12]),
        # The first at or after 50, 100 samples; nothing before.
        (Keep(every_samples=50), {}, [5, 10, 11, 12]),
        (Keep(every_samples=35), {}, [4, 7, 11, 12]),
        (Keep(every_samples=1000), {}, [11, 12]),
        (BY_LOSS, {3: 1.0, 6: 2.0}, [3, 11, 12]),
        (BY_LOSS, {3: 2.0, 12: 1.0}, [11, 12]),
        (BY_LOSS, {}, [11, 12]),
        # The best of those that exist: 99 could not be saved.
        (BY_LOSS, {3: 2.0, 7: 3.0, 99: 1.0}, [3, 11, 12]),
        (Keep(every_samples=50, best=BestMetric(mode="max")), {7: 3.0, 8: 1.0}, [5, 7, 10, 11, 12]),
        (Keep(), {3: 1.0}, [11, 12]),
    ],
)
def test_what_stays(tmp_path: Path, keep: Keep, values: dict[int, float], expected: list[int]):
    """The result is the same after each save as once at the end."""
    for step in range(1, 13):
        write(tmp_path, step)
        retain(tmp_path, keep, {s: value for s, value in values.items() if s <= step or s == 99})
    assert left(tmp_path) == expected
    at_once = tmp_path / "at once"
    write(at_once, *range(1, 13))
    retain(at_once, keep, values)
    assert left(at_once) == expected


def test_a_damaged_old_checkpoint_is_no_milestone_and_ends_nothing(tmp_path: Path):
    write(tmp_path, 6, 7, 8, 9)
    (tmp_path / "step-6" / "state.json").write_text("{")
    retain(tmp_path, Keep(every_samples=50), {})
    assert left(tmp_path) == [7, 8, 9]


def test_a_milestone_is_the_first_checkpoint_that_exists_after_it(tmp_path: Path):
    """A run that is stopped also saves at steps between the regular ones."""
    write(tmp_path, 4, 6, 7, 8, 20)
    retain(tmp_path, Keep(every_samples=50), {})
    assert left(tmp_path) == [6, 8, 20]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("min", [3.0, 2.0, 2.5, 2.0], 2),
        ("max", [3.0, 2.0, 4.0], 3),
        ("min", [float("nan"), float("inf"), float("-inf")], None),
        ("min", [float("nan"), 5.0, float("nan")], 2),
        ("min", [], None),
    ],
)
def test_the_best_is_finite_and_first(mode, values, expected):
    assert BestMetric(mode=mode).best(dict(enumerate(values, start=1))) == expected


def test_values_come_from_evaluations_of_trained_weights():
    logged = [
        {"step": 0, "eval/loss": 9.0, "eval/kl": 1.0},
        {"step": 5, "train/loss": 7.0},
        {"step": 10, "eval/loss": 8.0, "eval/kl": 2.0},
    ]
    assert BestMetric(metric="eval/kl").values(logged) == {10: 2.0}


def test_a_metric_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(UserError) as refused:
        BestMetric(metric="eval/psnr").values([{"step": 0, "eval/loss": 1.0, "eval/kl": 2.0}])
    assert "checkpoint.keep.best.metric = 'eval/psnr' is no metric" in str(refused.value)
    assert "there are eval/kl, eval/loss." in str(refused.value)


@pytest.fixture
def world(tmp_path: Path) -> World:
    write_shards(tmp_path / "shards")
    return World(tmp_path / "shards", tmp_path)


def test_the_best_checkpoint_of_a_run_is_saved_when_found_and_stays(world: World):
    """eval/samples never changes: the first evaluation stays the best, at no step of saving."""
    given = (
        *("num_steps=9", "evaluation.every_steps=2", "checkpoint.every_steps=3"),
        "checkpoint.keep.best={metric: eval/samples}",
    )
    run = world.run(given)
    assert left(run / "checkpoints") == [2, 6, 9]
    assert load_run(run, step="best").step == 2
    assert load_run(run).step == 9


def test_without_a_best_none_can_be_asked_for(world: World):
    with pytest.raises(UserError, match=r"has no best checkpoint: set checkpoint\.keep"):
        load_run(world.run(()), step="best")


def test_a_run_that_no_longer_gets_better_ends_and_stays_ended(world: World):
    given = (
        *("num_steps=20", "evaluation={every_steps: 2, patience: 3}"),
        "checkpoint={every_steps: 100, keep: {best: {metric: eval/samples}}}",
    )
    run = world.run(given)
    message = "no evaluation since step 2 was better: evaluation.patience"
    ended = {"status": "done", "exit_code": 0, "step": 8, "message": message}
    assert json.loads((run / "outcome.json").read_bytes()) == ended
    assert left(run / "checkpoints") == [2, 8]
    before = (run / "metrics.jsonl").read_bytes()
    again = World(world.shards, world.tmp_path)
    assert again.run(given) == run  # the same command
    assert json.loads((run / "outcome.json").read_bytes()) == ended
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_wrong_metric_is_told_on_the_resume_before_any_step(world: World):
    world.run(("num_steps=4",))
    config = world.config(("num_steps=8", "checkpoint.keep.best.metric=eval/lsos"))
    again = config.model_copy(update={"run_dir": str(world.tmp_path / "0")})
    with pytest.raises(UserError, match="'eval/lsos' is no metric"):
        train(again)
    assert left(world.tmp_path / "0" / "checkpoints") == [4]
