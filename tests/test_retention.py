"""What stays of a run's checkpoints: the newest, milestones, the best; and a run that gives up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint import BestSoFar, list_checkpoints, read_state, save_checkpoint
from pipeline.errors import UserError
from pipeline.retention import BestMetric, Keep, judge, retain
from pipeline.rundir import load_run
from tests.config_runs import World, records, write_shards
from tests.test_checkpoint import STATE, some_tensors

LOSS = BestMetric(metric="eval/loss")


def write(directory: Path, *steps: int) -> None:
    """Checkpoints of batches of ten."""
    for step in steps:
        state = replace(STATE, step=step, position=10 * step)
        save_checkpoint(directory, state, some_tensors(step))


def left(directory: Path) -> list[int]:
    return sorted(read_state(path).step for path in list_checkpoints(directory))


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [
        (Keep(), None, [11, 12]),
        (Keep(latest=4), None, [9, 10, 11, 12]),
        # The first at or after 50, 100 samples; nothing before.
        (Keep(every_samples=50), None, [5, 10, 11, 12]),
        (Keep(every_samples=35), None, [4, 7, 11, 12]),
        (Keep(every_samples=1000), None, [11, 12]),
        (Keep(), 3, [3, 11, 12]),
        (Keep(), 12, [11, 12]),
        (Keep(every_samples=50), 7, [5, 7, 10, 11, 12]),
    ],
)
def test_what_stays(tmp_path: Path, keep: Keep, best: int | None, expected: list[int]):
    """The same whether it is asked after each save or once at the end."""
    for step in range(1, 13):
        write(tmp_path, step)
        retain(tmp_path, keep, best_step=best if best is not None and best <= step else None)
    assert left(tmp_path) == expected
    at_once = tmp_path / "at once"
    write(at_once, *range(1, 13))
    retain(at_once, keep, best_step=best)
    assert left(at_once) == expected


def test_a_milestone_is_the_first_checkpoint_that_exists_after_it(tmp_path: Path):
    """A run that is stopped saves at odd steps, too."""
    write(tmp_path, 4, 6, 7, 8, 20)
    retain(tmp_path, Keep(every_samples=50))
    assert left(tmp_path) == [6, 8, 20]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("min", [3.0, 2.0, 2.5, 2.0], (2.0, 2, 2)),
        ("max", [3.0, 2.0, 4.0], (4.0, 3, 0)),
        ("min", [float("nan"), float("inf"), float("-inf")], (None, None, 3)),
        ("min", [float("nan"), 5.0, float("nan")], (5.0, 2, 1)),
    ],
)
def test_the_best_is_finite_first_and_counted(mode, values, expected):
    best = None
    for step, value in enumerate(values, start=1):
        by = BestMetric(metric="eval/loss", mode=mode)
        best = judge(best, by, {"eval/loss": value}, step)
    assert best is not None
    assert (best.value, best.step, best.evaluations_since) == expected


def test_another_metric_starts_anew():
    best = BestSoFar("eval/kl", "min", value=1.0, step=5, evaluations_since=2)
    assert judge(best, LOSS, {"eval/loss": 7.0}, 9) == BestSoFar("eval/loss", "min", 7.0, 9, 0)


def test_a_metric_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(UserError) as refused:
        judge(None, BestMetric(metric="eval/psnr"), {"eval/loss": 1.0, "eval/kl": 2.0}, 0)
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
    best = read_state(run / "checkpoints" / "step-9").best
    assert best is not None
    assert (best.step, best.evaluations_since) == (2, 4)
    logged = {r["step"]: r["eval/samples"] for r in records(run) if "eval/samples" in r}
    assert best.value == logged[2]
    assert load_run(run, step="best").step == 2
    assert load_run(run).step == 9


def test_without_a_best_none_can_be_asked_for(world: World):
    with pytest.raises(UserError, match="step-4 knows of no best checkpoint: set "):
        load_run(world.run(()), step="best")


def test_a_run_that_no_longer_gets_better_ends_and_stays_ended(world: World):
    given = (
        *("num_steps=20", "evaluation={every_steps: 2, patience: 3}"),
        "checkpoint={every_steps: 100, keep: {best: {metric: eval/samples}}}",
    )
    run = world.run(given)
    message = "eval/samples was best at step 2, and not since: evaluation.patience"
    ended = {"status": "done", "exit_code": 0, "step": 8, "message": message}
    assert json.loads((run / "outcome.json").read_bytes()) == ended
    assert left(run / "checkpoints") == [2, 8]
    before = (run / "metrics.jsonl").read_bytes()
    again = World(world.shards, world.tmp_path)
    assert again.run(given) == run  # the same command
    assert json.loads((run / "outcome.json").read_bytes()) == ended
    assert (run / "metrics.jsonl").read_bytes() == before
