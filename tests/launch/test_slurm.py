"""A real Slurm controller and two nodes on this machine: trains, is preempted, resumes, exports."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.launch.runs import num_logged, outcome, result_of, write_config
from tests.launch.slurm_cluster import SlurmCluster, missing
from tests.processes import Result

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = ("--nodes", 2, "--device", "cpu", "--cpus-per-process", 1)


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    absent = missing()
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}; apt-get install slurm-wlm munge")
    cluster = SlurmCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def submit(run_processes: Callable[..., Result], slurm: SlurmCluster) -> Callable[..., int]:
    """Hand a job in by our launcher, and return its number."""

    def submit(config: Path, *options: object, **env: str) -> int:
        argv = ("slurm", config, *NODES, *options, "--submit")
        result = run_processes("launch", None, *argv, env=slurm.env | env)
        assert result.code == 0, result.output
        found = re.search(r"^Submitted batch job (\d+)$", result.output, re.MULTILINE)
        assert found is not None, result.output
        return int(found[1])

    return submit


@pytest.mark.soak
def test_out_of_time_a_job_saves_queues_itself_again_and_ends_bit_for_bit_the_same(
    slurm: SlurmCluster,
    submit: Callable[..., int],
    run_processes: Callable[..., Result],
    tiny_shards: Path,
    tmp_path: Path,
):
    """Two nodes x one process; Slurm itself sends the signal near the end of the time limit."""
    config, run = write_config(tmp_path, tiny_shards, 1_000_000), tmp_path / "run"
    # One minute was over, less the grace, before the first step on a slow machine.
    number = submit(config, "--time", "00:02:00", "--grace", 20)
    slurm.wait_until(lambda: outcome(run)["status"] == "preempted", 180)
    stopped = outcome(run)
    assert stopped["message"] == f"stopped by the file {run / 'STOP'}"
    assert stopped["step"] > 0

    # While it waits in the queue: an end within reach, and time enough not to be stopped again.
    slurm.wait_until(lambda: slurm.state(number) == "PENDING", 30)
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    steps = stopped["step"] + 20
    write_config(tmp_path, tiny_shards, steps)
    slurm.wait_until(lambda: slurm.state(number) in ("COMPLETED", "FAILED"), 120)
    log = (run / f"slurm-{number}.out").read_text()
    assert slurm.state(number) == "COMPLETED", log
    assert slurm.job(number)["Restarts"] == "1"
    assert f"step {stopped['step'] + 1}/{steps} " in log
    assert not (run / "STOP").exists()

    once = tmp_path / "once"
    argv = ("local", "--submit", "--processes", 2, config, f"run_dir={once}")
    uninterrupted = run_processes("launch", None, *argv)
    assert uninterrupted.code == 0, uninterrupted.output
    assert result_of(run, steps) == result_of(once, steps)


def test_an_export_is_an_array_whose_elements_go_on_and_gives_the_same_bytes(
    slurm: SlurmCluster,
    submit: Callable[..., int],
    run_processes: Callable[..., Result],
    tiny_shards: Path,
    tmp_path: Path,
):
    folder, run = tmp_path, tmp_path / "run"
    trained = run_processes("pipeline.train", None, write_config(folder, tiny_shards, 5))
    assert trained.code == 0, trained.output
    config = folder / "export.yaml"
    config.write_text(f"run: {run}\nout: {folder / 'array'}\nformats: [{{kind: tar}}]\n")
    number = submit(config, "--module", "pipeline.export")
    slurm.wait_until(lambda: f"{number}_0.0" in slurm.ask("squeue", "-h", "-s"), 60)
    slurm.ask("scancel", "--batch", "--signal=USR1", f"{number}_0")
    slurm.wait_until(lambda: slurm.job(f"{number}_0")["Restarts"] == "1", 30)
    slurm.wait_until(lambda: not {"PENDING", "RUNNING"} & set(slurm.state(number).split()), 120)
    logs = [folder / f"export-slurm-{number}_{element}.out" for element in (0, 1)]
    assert slurm.state(number) == "COMPLETED", [log.read_text() for log in logs]

    argv = ("local", "--submit", "--module", "pipeline.export", config, f"out={folder / 'local'}")
    alone = run_processes("launch", None, *argv)
    assert alone.code == 0, alone.output
    both = [contents(folder / name) for name in ("array", "local")]
    assert any(name.endswith(".tar") for name in both[0])
    assert "_SUCCESS" in both[0]
    assert both[0] == both[1]


def contents(export: Path) -> dict[str, bytes]:
    """All files of an export but the records of who did what."""
    files = {str(path.relative_to(export)): path for path in export.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("_run/")}


def cancel(slurm: SlurmCluster, number: int, run: Path) -> str:
    """Cancel a job that trains; see that it saved before it ended, and return what it printed."""
    slurm.ask("scancel", str(number))
    slurm.wait_until(lambda: slurm.state(number) == "CANCELLED", 60)
    log = (run / f"slurm-{number}.out").read_text()
    assert outcome(run)["status"] == "preempted", log
    assert list((run / "checkpoints").iterdir())
    return log


@pytest.mark.soak
def test_scancel_of_a_job_of_one_process_saves_too(
    slurm: SlurmCluster, submit: Callable[..., int], tiny_shards: Path, tmp_path: Path
):
    """accelerate starts it without torchrun, and would die of the signal before it has saved."""
    config, run = write_config(tmp_path, tiny_shards, 1_000_000), tmp_path / "run"
    number = submit(config, "--nodes", 1)
    slurm.wait_until(lambda: num_logged(run) >= 2, 90)
    assert "sbatch resumes it" in cancel(slurm, number, run)


def keys_of_trainers(config: Path) -> set[str | None]:
    """The variable KEY of the processes that train."""
    found: set[str | None] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if words[-1:] == [str(config)] and "pipeline.train" in words:
                found.add(process.environ().get("KEY"))
    return found


def test_a_port_in_use_is_passed_over_and_scancel_saves_and_is_the_end(
    slurm: SlurmCluster, submit: Callable[..., int], tiny_shards: Path, tmp_path: Path
):
    """Where a site has set SBATCH_EXPORT, as many do: then srun by itself hands no variable on."""
    file = tmp_path / "keys.env"
    file.write_text("KEY='a b'\n")
    run = tmp_path / "a run of 50%"  # characters that Slurm's file names interpret
    config = write_config(tmp_path, tiny_shards, 1_000_000, run.name)
    with ExitStack() as held:  # whatever the job's number is, others have its port already
        for port in range(10001, 10015):
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):  # somebody really has it: just as well
                listener.bind(("127.0.0.1", port))
                listener.listen()
        number = submit(config, "--env-file", file, SBATCH_EXPORT="NONE")
        assert number < 10
        slurm.wait_until(lambda: num_logged(run) >= 2, 90)
    assert keys_of_trainers(config) == {"a b"}
    cancel(slurm, number, run)
    time.sleep(7)  # longer than a job that is queued again would wait
    assert slurm.state(number) == "CANCELLED"


@pytest.mark.soak
def test_the_last_restart_says_so_and_zero_trains_across_nodes(
    slurm: SlurmCluster, submit: Callable[..., int], tiny_shards: Path, tmp_path: Path
):
    config, run = write_config(tmp_path, tiny_shards, 1_000_000), tmp_path / "run"
    number = submit(config, "--max-restarts", 0, "--strategy", "zero2")
    slurm.wait_until(lambda: num_logged(run) >= 2 or slurm.state(number) == "FAILED", 120)
    slurm.ask("scancel", "--batch", "--signal=USR1", str(number))
    slurm.wait_until(lambda: slurm.state(number) == "FAILED", 90)
    log = (run / f"slurm-{number}.out").read_text()
    assert outcome(run)["status"] == "preempted", log
    assert log.endswith("preempted, and not queued again after 0 restarts; sbatch resumes it\n")
    assert slurm.job(number)["ExitCode"] == "3:0"
    [state] = (run / "checkpoints").glob("step-*/state.json")
    assert json.loads(state.read_text())["world"] == 2
