"""A process that makes no progress ends the job, and is named with the phase it hangs in."""

import json
import pickle
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch.runs import outcome, write_config
from tests.processes import ROOT

WORKER = ROOT / "tests/distributed/watchdog_worker.py"
GRACE = 10  # for the reports of others: see pipeline.distributed.watchdog
pytestmark = [pytest.mark.fault, pytest.mark.distributed]


@pytest.mark.parametrize(
    ("strategy", "stopped", "limit"),
    [
        ("ddp", 0, 6),
        pytest.param("ddp", 1, 6, marks=pytest.mark.soak),
        # DeepSpeed alone takes some seconds to start.
        pytest.param("zero2", 1, 15, marks=[pytest.mark.deepspeed, pytest.mark.soak]),
    ],
)
def test_a_stopped_process_is_named_and_the_job_ends(
    tmp_path: Path,
    tiny_shards: Path,
    start_processes: Callable,
    strategy: str,
    stopped: int,
    limit: int,
):
    config, run = write_config(tmp_path, tiny_shards, 100_000), tmp_path / "run"
    settings = (f"watchdog.seconds={limit}", "monitor.log_every_steps=10")
    running = start_processes("pipeline.train", 2, config, *settings, strategy=strategy)
    running.wait_for("step 20/", timeout=120)
    everybody = running.everything()
    ranks = running.ranks()
    ranks[stopped].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    _, left = psutil.wait_procs(everybody, timeout=limit + GRACE + 10)
    took = time.monotonic() - since
    assert not left, running.output
    assert took > limit
    print(f"{strategy}, rank {stopped} stopped: all gone after {took:.1f} s, limit {limit} s")

    other, pid = 1 - stopped, ranks[stopped].pid
    assert f"watchdog: rank {other} (process {ranks[other].pid} on " in running.output
    # The stacks, also of what the training waits in: a step, or what all agree upon after it.
    assert re.search(r'pipeline/train.py", line \d+ in train\n', running.output)
    verdict = f"rank {stopped} (process {pid} on "
    ended = outcome(run)
    assert (ended["status"], ended["exit_code"]) == ("failed", 1)
    assert f"no progress for {limit} s: rank {other} (" in ended["message"]
    assert verdict in ended["message"].split("; ")[1]
    assert "left no report within 10 s: stopped, dead or cut off" in ended["message"]
    report = json.loads(next(run.glob(f"failure/*/rank-{other}.json")).read_bytes())
    assert report["phase"] in ("update", "log")
    assert 'pipeline/train.py"' in next(run.glob(f"failure/*/rank-{other}.txt")).read_text()
    record = pickle.loads(next(run.glob(f"failure/*/collectives-rank-{other}")).read_bytes())
    assert any(one["profiling_name"].startswith("gloo:") for one in record["entries"])


def test_a_job_that_stood_still_as_a_whole_goes_on(
    tmp_path: Path, tiny_shards: Path, start_processes: Callable
):
    """As a laptop does that sleeps, or a virtual machine that moves."""
    config, run = write_config(tmp_path, tiny_shards, 100_000), tmp_path / "run"
    settings = ("watchdog.seconds=3", "monitor.log_every_steps=10")
    running = start_processes("pipeline.train", None, config, *settings)
    running.wait_for("step 20/", timeout=120)
    process = psutil.Process(running.pid)
    process.suspend()
    time.sleep(6)
    process.resume()
    size = (run / "metrics.jsonl").stat().st_size
    time.sleep(4)
    assert running.running, running.output
    assert (run / "metrics.jsonl").stat().st_size > size
    assert "watchdog" not in running.output


@pytest.mark.parametrize(
    ("hangs", "last"),
    [
        # Who still saves step 10, or waits for the data of step 11, keeps the other from step 11.
        pytest.param(("checkpoint:10:0", "update:11:0"), 0, marks=pytest.mark.soak),
        pytest.param(("update:11:0", "data:11:0"), 1, marks=pytest.mark.soak),
        # It came to its phase later than it would bark by itself before the first one gives up.
        (("data:11:0", "update:11:4"), 0),
    ],
)
def test_who_is_the_furthest_behind_is_told_and_nobody_is_killed(
    tmp_path: Path, run_processes: Callable, hangs: tuple[str, str], last: int
):
    result = run_processes(WORKER, 2, tmp_path, 5, *hangs, timeout=60)
    assert result.code != 0
    message = outcome(tmp_path)["message"]
    print(message)
    for rank, hang in enumerate(hangs):
        phase, step, _ = hang.split(":")
        assert re.search(rf"rank {rank} \(.*?\) has been in phase {phase} of step {step} ", message)
    assert message.endswith(f"; rank {last} is the furthest behind")
    assert "SIGKILL" not in result.output
