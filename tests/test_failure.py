"""Trouble of one process: its own error is the run's, its peers end, too, and nothing is left."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.errors import UserError
from pipeline.outcome import begin, record_exception
from tests.launch.runs import outcome, write_config

PEERS_GONE_SECONDS = 35.0


@pytest.mark.fault
@pytest.mark.distributed
def test_memory_that_runs_out_in_one_process_is_the_runs_error(
    tmp_path: Path, tiny_shards: Path, start_processes: Callable
):
    """Rank 1 may map no more memory from some moment on; rank 0 only loses its peer."""
    config, run = write_config(tmp_path, tiny_shards, 100_000), tmp_path / "run"
    # A micro-batch of float images, 36 MB, is more than the allocator keeps between steps.
    settings = ("batch_size=6000", "data.lanes=12", "model.backbone={kind: mlp, hidden: [8]}")
    running = start_processes("pipeline.train", 2, config, *settings)
    running.wait_for("step 2/", timeout=120)
    everybody = running.everything()
    ranks = {int(rank.environ()["RANK"]): rank for rank in running.ranks()}
    used = ranks[1].memory_info().vms
    resource.prlimit(ranks[1].pid, resource.RLIMIT_AS, (used // 2, used // 2))
    since = time.monotonic()
    _, left = psutil.wait_procs(everybody, timeout=PEERS_GONE_SECONDS)
    assert not left, running.output
    print(f"all gone after {time.monotonic() - since:.1f} s")

    ended = outcome(run)
    print(ended["message"])
    assert (ended["status"], ended["exit_code"]) == ("failed", 1)
    assert ended["message"].startswith("rank 1: ")
    assert "a smaller batch_size" in ended["message"]
    assert "Traceback (most recent call last)" in (run / "failure" / "rank-1.txt").read_text()
    # Rank 1's, and the launcher's own about an exit code.
    assert running.output.count("Traceback (most recent call last)") == 2, running.output
    assert "rank 0 ends, too" in running.output


def test_the_first_word_counts(tmp_path: Path):
    begin(tmp_path)
    assert outcome(tmp_path)["status"] == "running"
    first, second = RuntimeError("the cause"), RuntimeError("a consequence")
    assert record_exception(tmp_path, first, rank=3, world=4)
    assert not record_exception(tmp_path, second, rank=0, world=4)
    assert outcome(tmp_path)["message"] == "rank 3: RuntimeError: the cause"
    assert "a consequence" in (tmp_path / "failure" / "rank-0.txt").read_text()
    begin(tmp_path)
    assert not (tmp_path / "failure").exists()


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (UserError("x is wrong"), "UserError: x is wrong", 2),
        (RuntimeError("x"), "RuntimeError: x", 1),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", 1),
        (MemoryError(), "MemoryError:  (less memory is needed with a larger accumulation, a ", 1),
        (RuntimeError("CUDA out of memory. Tried"), "a smaller batch_size, or model.gradient", 1),
    ],
)
def test_an_exception_becomes_an_outcome(tmp_path, error: BaseException, message: str, code: int):
    begin(tmp_path)
    assert record_exception(tmp_path, error, rank=0, world=1)
    ended = outcome(tmp_path)
    assert (ended["status"], ended["exit_code"]) == ("failed", code)
    assert message in ended["message"]


def test_where_nothing_can_be_written_the_error_itself_stays(tmp_path: Path, capsys):
    run = tmp_path / "gone"
    assert record_exception(run, RuntimeError("the cause"), rank=0, world=2)
    assert f"how this run failed could not be recorded in {run}" in capsys.readouterr().err
