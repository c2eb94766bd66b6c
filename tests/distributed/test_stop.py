"""SIGTERM to the launcher at any moment: saved and ended within 15 s, and nothing is lost."""

import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.training.loading import load_run
from tests.launch.runs import outcome, result_of, write_config
from tests.processes import ROOT, Processes, argv_of

NUM_STEPS = 60
GONE_SECONDS = 15.0
# Evaluations take most of the time: over all samples, in small batches, after every third step.
SETTINGS = (
    f"num_steps={NUM_STEPS}",
    "batch_size=4",
    "evaluation={split: all, every_steps: 3}",
    "checkpoint={every_steps: 4, keep: {best: {metric: eval/loss}}}",
    "monitor.num_images=1",
)

pytestmark = [pytest.mark.fault, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """The run directory of a run with this many processes that is not stopped."""

    @functools.cache
    def run(num_processes: int) -> Path:
        folder = tmp_path_factory.mktemp(f"undisturbed-{num_processes}")
        config = write_config(folder, tiny_shards, NUM_STEPS)
        argv = [*argv_of("pipeline.train", num_processes), str(config), *SETTINGS]
        result = Processes(argv, folder / "log", env={}, cwd=ROOT, forked=True).wait(300)
        assert result.code == 0, result.output
        return folder / "run"

    return run


def after_the_guard(running: Processes, run: Path) -> None:
    """As soon as this start has taken over the run directory."""
    while outcome(run)["status"] != "running":
        assert running.running, running.output


def in_a_step(running: Processes, run: Path) -> None:
    running.wait_for(f"/{NUM_STEPS} ", timeout=120)


def in_a_save(running: Processes, run: Path) -> None:
    """While the files of a checkpoint are there, but not yet published."""
    running.wait_for(f"/{NUM_STEPS} ", timeout=120)
    while not any((run / "checkpoints").glob("step-*.tmp-*")):
        assert running.running, running.output


def in_an_evaluation(running: Processes, run: Path) -> None:
    """Most likely within an evaluation, which takes most of the time of every third step."""
    running.wait_for(f"/{NUM_STEPS} ", timeout=120)
    while newest_step(run) % 3 != 2:
        assert running.running, running.output
    time.sleep(0.05)


def newest_step(run: Path) -> int:
    """The last step that was logged."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def evaluations(run: Path) -> dict[int, float]:
    """The held-out loss by step; no step has two."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [(r["step"], r["eval/loss"]) for r in map(json.loads, lines) if "eval/loss" in r]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize(
    ("trial", "num_processes"),
    [
        (0, 2),
        pytest.param(0, 1, marks=pytest.mark.soak),
        *(pytest.param(t, n, marks=pytest.mark.soak) for t in range(1, 6) for n in (1, 2)),
    ],
)
def test_stopped_at_any_moment_it_is_gone_soon_and_loses_nothing(
    tmp_path: Path,
    tiny_shards: Path,
    start_processes: Callable,
    undisturbed: Callable,
    num_processes: int,
    trial: int,
):
    """One run, stopped at each kind of moment in turn."""
    chance = random.Random(f"{num_processes}/{trial}")
    config, run = write_config(tmp_path, tiny_shards, NUM_STEPS), tmp_path / "run"
    reached = [-1]
    for moment in (after_the_guard, in_a_step, in_a_save, in_an_evaluation):
        running = start_processes("pipeline.train", num_processes, config, *SETTINGS)
        moment(running, run)
        if moment is not in_an_evaluation:
            time.sleep(chance.uniform(0, 0.05))
        everybody = running.everything()
        os.kill(running.pid, signal.SIGTERM)
        since = time.monotonic()
        _, left = psutil.wait_procs(everybody, timeout=GONE_SECONDS)
        seconds = time.monotonic() - since
        assert not left, f"{GONE_SECONDS} s after SIGTERM {moment.__name__}: {running.output}"
        ended = outcome(run)
        assert (ended["status"], ended["exit_code"]) == ("preempted", 3), running.output
        assert ended["message"] == "stopped by signal SIGTERM"
        assert ended["step"] >= reached[-1]
        reached.append(ended["step"])
        print(f"{moment.__name__}: gone after {seconds:.1f} s, at step {ended['step']}")
    assert reached[-1] % 3 == 0
    assert reached[-1] not in evaluations(run), "the evaluation came to its end"
    assert reached[-1] < NUM_STEPS

    ended = start_processes("pipeline.train", num_processes, config, *SETTINGS).wait(300)
    assert ended.code == 0, ended.output
    reference = undisturbed(num_processes)
    assert result_of(run, NUM_STEPS) == result_of(reference, NUM_STEPS)
    assert evaluations(run) == evaluations(reference)
    assert max(evaluations(run)) == NUM_STEPS
    best = load_run(run, step="best").step
    assert best == load_run(reference, step="best").step
    losses = {step: loss for step, loss in evaluations(run).items() if step}
    assert best == min(losses, key=lambda step: losses[step])
