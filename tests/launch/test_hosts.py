"""Several machines: two network namespaces train together, lose their connection, and resume."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts, missing
from tests.launch.runs import outcome, result_of, write_config
from tests.processes import ROOT, Processes, argv_of, env_of

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]
NUM_STEPS = 40
MARGIN = 30  # seconds in which a job ends after the watchdog's limit


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    absent = missing()
    if absent:
        pytest.skip(absent)
    two = Hosts()
    yield two
    two.close()


@pytest.fixture
def train(hosts: Hosts, tmp_path: Path) -> Iterator[Callable[..., list[Processes]]]:
    """Start a config on both hosts by the documented command; ended with the test."""
    started: list[Processes] = []

    def start(topology: str, *arguments: object, strategy: str = "ddp") -> list[Processes]:
        env = env_of(strategy) | hosts.env()
        both = [
            Processes(
                hosts.argv(host, topology, *arguments),
                tmp_path / f"host-{host}-{len(started)}.log",
                env=env,
                cwd=ROOT,
            )
            for host in (0, 1)
        ]
        started.extend(both)
        return both

    yield start
    for processes in started:
        if processes.running:
            processes.kill()


@pytest.fixture(scope="module")
def one_host(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes on one host, never interrupted, arrive at."""
    folder = tmp_path_factory.mktemp("one-host")
    config = write_config(folder, tiny_shards, NUM_STEPS)
    argv = [*argv_of("pipeline.train", 2), str(config)]
    result = Processes(argv, folder / "log", env={}, cwd=ROOT).wait()
    assert result.code == 0, result.output
    return result_of(folder / "run", NUM_STEPS)


def test_ddp_over_two_hosts_is_ddp_on_one_bit_for_bit(
    train: Callable[..., list[Processes]],
    hosts: Hosts,
    one_host: dict,
    tiny_shards: Path,
    tmp_path: Path,
):
    both = train("multi-node.yaml", write_config(tmp_path, tiny_shards, NUM_STEPS))
    ended = [processes.wait(120) for processes in both]
    assert [result.code for result in ended] == [0, 0], ended
    assert result_of(tmp_path / "run", NUM_STEPS) == one_host
    assert hosts.running() == []


@pytest.mark.soak
@pytest.mark.deepspeed
def test_zero_trains_over_two_hosts(
    train: Callable[..., list[Processes]], hosts: Hosts, tiny_shards: Path, tmp_path: Path
):
    both = train("zero2.yaml", write_config(tmp_path, tiny_shards, 6), strategy="zero2")
    ended = [processes.wait(120) for processes in both]
    assert [result.code for result in ended] == [0, 0], ended
    assert json.loads(result_of(tmp_path / "run", 6)["state"])["world"] == 2
    assert hosts.running() == []


@pytest.mark.soak
def test_cut_apart_both_hosts_end_and_the_same_command_ends_as_if_nothing_had_been(
    train: Callable[..., list[Processes]],
    hosts: Hosts,
    one_host: dict,
    tiny_shards: Path,
    tmp_path: Path,
):
    """No process dies, and no connection is closed: each waits for what never arrives."""
    config, run = write_config(tmp_path, tiny_shards, NUM_STEPS), tmp_path / "run"
    command = ("multi-node.yaml", config, "checkpoint.every_steps=4")
    limit = 12
    both = train(*command, f"watchdog.seconds={limit}")
    both[0].wait_for(f"step 10/{NUM_STEPS} ", timeout=90)
    hosts.connect(False)
    began = time.monotonic()
    ended = [processes.wait(limit + MARGIN) for processes in both]
    seconds = time.monotonic() - began
    print(f"ended {seconds:.1f} s after the cut, with watchdog.seconds = {limit}")
    assert seconds > limit / 2, "it was not the cut that ended them"
    for rank, result in enumerate(ended):
        assert result.code != 0, result.output
        assert f"watchdog: rank {rank} (process " in result.output
        assert f"limit watchdog.seconds = {limit}" in result.output
        assert "Traceback (most recent call last)" not in result.output.partition("watchdog")[0]
    assert hosts.running() == []
    ended = outcome(run)
    assert (ended["status"], ended["exit_code"]) == ("failed", 1)
    assert ended["message"].startswith(f"no progress for {limit} s: rank 0 (process ")

    hosts.connect(True)
    again = [processes.wait(120) for processes in train(*command)]
    assert [result.code for result in again] == [0, 0], again
    assert f"step 1/{NUM_STEPS} " not in again[0].output
    assert result_of(run, NUM_STEPS) == one_host
    assert hosts.running() == []
