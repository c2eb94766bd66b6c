"""Start-up checks, stop requests and collectives, in one process."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.distributed import runtime as module
from pipeline.distributed.runtime import Runtime, StopRequest, check_launch


@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({}, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3, 4),
    ],
)
def test_processes_that_are_what_was_announced_may_start(
    environment: dict[str, str], rank: int, world: int
):
    check_launch(environment, rank=rank, world=world)


@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, 0, 1),  # each takes itself for the only one
        ({"RANK": "0", "WORLD_SIZE": "2"}, 0, 1),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 2, 4),
        ({}, 0, 2),
    ],
)
def test_processes_that_do_not_see_each_other_may_not_start(
    environment: dict[str, str], rank: int, world: int
):
    announced = f"{environment.get('RANK', 0)} of {environment.get('WORLD_SIZE', 1)}"
    with pytest.raises(UserError) as refused:
        check_launch(environment, rank=rank, world=world)
    text = str(refused.value)
    assert f"the launcher announced process {announced} (RANK, WORLD_SIZE)" in text
    assert f"runs as process {rank} of {world}: the processes do not see each other" in text
    assert "latentmill config cpu-ddp" in text


def test_starting_alone_where_two_were_announced_is_refused(monkeypatch: pytest.MonkeyPatch):
    Runtime.start(accumulation=1)  # accelerate keeps that this is the only process
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="announces 2 processes, but MASTER_ADDR, MASTER_PORT is"):
        Runtime.start(accumulation=1)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="process 1 of 2 .* but accelerate runs as process 0 of 1"):
        Runtime.start(accumulation=1)
    ctypes.CDLL(None).prctl(1, 0)  # undo PR_SET_PDEATHSIG, which launched processes set


def test_one_process_is_its_own_group():
    runtime = Runtime.start(accumulation=4)
    assert (runtime.rank, runtime.world, runtime.is_main) == (0, 1, True)
    assert runtime.accelerator.gradient_accumulation_steps == 4
    assert runtime.accelerator.mixed_precision == "no"
    assert runtime.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert (runtime.any(True), runtime.any(False)) == (True, False)
    assert runtime.gather("mine") == ["mine"]
    assert runtime.broadcast({"a": 1}) == {"a": 1}
    assert runtime.first_reason(None) is None
    assert runtime.first_reason("full") == "full"


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[StopRequest]:
    with closing(StopRequest(tmp_path)) as request:
        yield request


def test_nothing_asks_to_stop_by_itself(stop: StopRequest):
    assert stop.reason() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_to_stop_and_kills_nobody(stop: StopRequest, number: signal.Signals):
    os.kill(os.getpid(), number)
    assert stop.reason() == f"signal {number.name}"
    assert stop.reason() == f"signal {number.name}"  # and it stays


def test_a_second_ctrl_c_interrupts(stop: StopRequest):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason() == "signal SIGINT"


def test_a_stop_file_asks_to_stop(stop: StopRequest, tmp_path: Path):
    (tmp_path / "STOP").touch()
    assert stop.reason() == f"the file {tmp_path / 'STOP'}"


def test_the_stop_file_is_looked_for_once_a_second(
    stop: StopRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    assert stop.reason() is None
    (tmp_path / "STOP").touch()
    now += 0.9
    assert stop.reason() is None
    now += 0.2
    assert stop.reason() is not None


def test_afterwards_signals_do_what_they_did_before(tmp_path: Path):
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with closing(StopRequest(tmp_path)):
        during = [signal.getsignal(number) for number in numbers]
    after = [signal.getsignal(number) for number in numbers]
    assert after == before
    assert not set(map(id, during)) & set(map(id, before))
