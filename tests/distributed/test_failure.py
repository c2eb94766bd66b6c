"""One process fails: its error is the run's, the other processes end, and none is left."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.common.errors import UserError
from pipeline.distributed.outcome import Failures, begin
from tests.launch.runs import outcome, write_config

PEERS_GONE_SECONDS = 35.0


@pytest.mark.soak
@pytest.mark.fault
@pytest.mark.distributed
def test_memory_that_runs_out_in_one_process_is_the_runs_error(
    tmp_path: Path, tiny_shards: Path, start_processes: Callable
):
    """Rank 1 gets no more memory after some steps; rank 0 only loses its peer."""
    config, run = write_config(tmp_path, tiny_shards, 100_000), tmp_path / "run"
    # A micro-batch of float images, 36 MB, is more than the allocator keeps between steps.
    settings = ("batch_size=6000", "data.lanes=12", "model.backbone={kind: mlp, hidden: [8]}")
    running = start_processes("pipeline.train", 2, config, *settings, forked=False)
    running.wait_for("step 2/", timeout=120)
    everybody = running.everything()
    ranks = running.ranks()
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
    assert "Traceback (most recent call last)" in next(run.glob("failure/*/rank-1.txt")).read_text()
    # One by rank 1, and one by the launcher, about the exit code.
    assert running.output.count("Traceback (most recent call last)") == 2, running.output
    assert "rank 0 ends as well" in running.output


def fail(failures: Failures, error: BaseException) -> BaseException:
    """Let the error leave the context, twice as `train` does; return what is raised."""
    with pytest.raises(BaseException) as left, failures.recorded(), failures.recorded():
        raise error
    return left.value


def test_the_first_word_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    attempt = begin(tmp_path)
    assert outcome(tmp_path)["status"] == "running"
    cause, consequence = RuntimeError("the cause"), RuntimeError("a consequence")
    assert fail(Failures(tmp_path, attempt, rank=3, world=4), cause) is cause
    other = Failures(tmp_path, attempt, rank=0, world=4)
    ended = fail(other, consequence)
    assert isinstance(ended, SystemExit)
    assert ended.code == 1
    assert "rank 0 ends as well (RuntimeError): see" in capsys.readouterr().err
    assert outcome(tmp_path)["message"] == "rank 3: RuntimeError: the cause"
    assert "a consequence" in (other.folder / "rank-0.txt").read_text()


def test_a_late_process_of_an_earlier_start_does_not_speak_for_this_one(tmp_path: Path):
    earlier = Failures(tmp_path, begin(tmp_path), rank=1, world=2)
    now = Failures(tmp_path, begin(tmp_path), rank=0, world=2)
    fail(earlier, RuntimeError("cut off"))
    error = RuntimeError("the cause")
    assert fail(now, error) is error
    assert outcome(tmp_path)["message"] == "rank 0: RuntimeError: the cause"


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (UserError("x is wrong"), "UserError: x is wrong", 2),
        (RuntimeError("x"), "RuntimeError: x", 1),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", 1),
        (MemoryError(), "MemoryError:  (a larger accumulation, a smaller batch_size or ", 1),
        (RuntimeError("CUDA out of memory. Tried"), "a smaller batch_size or model.gradient", 1),
    ],
)
def test_an_exception_becomes_an_outcome(tmp_path, error: BaseException, message: str, code: int):
    assert fail(Failures(tmp_path, begin(tmp_path), rank=0, world=1), error) is error
    ended = outcome(tmp_path)
    assert (ended["status"], ended["exit_code"]) == ("failed", code)
    assert message in ended["message"]


def test_where_nothing_can_be_written_the_error_itself_stays(tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    error = RuntimeError("the cause")
    assert fail(Failures(tmp_path / "file", "attempt", rank=0, world=2), error) is error
    told = capsys.readouterr().err
    assert f"the failure of this run could not be recorded in {tmp_path}/file" in told
