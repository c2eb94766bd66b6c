"""SIGKILL to one process, the launcher included, at random moments, again and again.

A small driver restarts the same command each time. The peers of a dead process end, nothing is left
behind, and the run ends with the bytes of one that nobody disturbed.
"""

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.distributed.models import MODELS
from tests.launch.runs import result_of, write_config
from tests.processes import ROOT, Processes, argv_of, env_of

WORLD = 2
# An eighth of the kills hits the start; the others a training for up to this many seconds.
MAX_SECONDS = 2.0
VICTIMS = ("rank 0", "rank 1", "launcher")
PEERS_GONE_SECONDS = 35.0
SETTINGS = ("checkpoint.every_steps=10", "evaluation.every_steps=60")

pytestmark = [pytest.mark.fault, pytest.mark.distributed, pytest.mark.timeout(1800)]


def kills(strategy: str, number: int) -> list:
    """The parameters of a strategy: for `make soak`. `test_resume` kills in every lane."""
    marks = [pytest.mark.soak] if strategy == "ddp" else [pytest.mark.deepspeed, pytest.mark.soak]
    return [pytest.param(model, strategy, number, marks=marks) for model in MODELS]


def length(model: str, number: int) -> int:
    """Steps of a run that is still under way at the last of so many kills."""
    return (150 if model == "burgess" else 50) * (1 + number)


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """How the run of a model and a strategy ends without kills."""

    @functools.cache
    def run(model: str, strategy: str, num_steps: int) -> dict:
        folder = tmp_path_factory.mktemp(f"undisturbed-{strategy}")
        config = write_config(folder, tiny_shards, num_steps)
        argv = [*argv_of("pipeline.train", WORLD, strategy), str(config), *SETTINGS, *MODELS[model]]
        started = Processes(argv, folder / "log", env=env_of(strategy), cwd=ROOT, forked=True)
        result = started.wait(600)
        assert result.code == 0, result.output
        return result_of(folder / "run", num_steps)

    return run


def strike(running: Processes, victim: str, chance: random.Random) -> float:
    """Kill `victim` at a random moment; return the seconds until the others ended."""
    if chance.random() < 1 / 8:
        while len(running.ranks()) < WORLD:  # the launcher is still starting them
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 5))
    else:
        running.wait_for("images/s", timeout=120)
        time.sleep(chance.uniform(0, MAX_SECONDS))
    everybody = running.everything()
    named = {f"rank {number}": rank for number, rank in enumerate(running.ranks())}
    (named | {"launcher": everybody[0]})[victim].kill()
    killed = time.monotonic()
    _, left = psutil.wait_procs(everybody, timeout=PEERS_GONE_SECONDS)
    assert not left, f"{PEERS_GONE_SECONDS} s after {victim} was killed: {left}\n{running.output}"
    return time.monotonic() - killed


@pytest.mark.parametrize(
    ("model", "strategy", "number"),
    [
        *kills("ddp", 20),
        *kills("zero1", 10),
        *kills("zero2", 10),
        *kills("zero3", 10),
    ],
)
def test_killed_one_by_one_it_ends_as_if_nobody_had_been(
    tmp_path: Path,
    tiny_shards: Path,
    start_processes: Callable,
    undisturbed: Callable,
    model: str,
    strategy: str,
    number: int,
):
    chance, num_steps = random.Random(f"{strategy}/{number}"), length(model, number)
    argv = ("pipeline.train", WORLD, write_config(tmp_path, tiny_shards, num_steps))
    start = functools.partial(start_processes, *argv, *SETTINGS, *MODELS[model], strategy=strategy)
    victims = [VICTIMS[place % len(VICTIMS)] for place in range(number)]
    chance.shuffle(victims)
    seconds = [strike(start(), victim, chance) for victim in victims]
    ended = start().wait(300)
    assert ended.code == 0, ended.output
    assert result_of(tmp_path / "run", num_steps) == undisturbed(model, strategy, num_steps)
    print(f"{strategy}: {victims}, the others gone within {max(seconds):.1f} s")


@pytest.mark.parametrize(
    "seconds", [0.0, *(pytest.param(0.5 * n, marks=pytest.mark.soak) for n in range(1, 14))]
)
def test_a_launcher_killed_while_its_processes_start_leaves_none_behind(
    tmp_path: Path, tiny_shards: Path, start_processes: Callable, seconds: float
):
    config = write_config(tmp_path, tiny_shards, 100_000)
    running = start_processes("pipeline.train", WORLD, config, forked=False)
    while len(running.ranks()) < WORLD:
        time.sleep(0.01)
    time.sleep(seconds)
    everybody = running.everything()
    everybody[0].kill()
    _, left = psutil.wait_procs(everybody, timeout=PEERS_GONE_SECONDS)
    assert not left, running.output
