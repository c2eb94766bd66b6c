"""A Job on this machine: argv and environment of `accelerate launch`, and running it to its end.

    Job -> command(job) -> `accelerate launch` -> trainers -> outcome.json -> exit code

The launchers underneath flatten every exit code to 1, SIGUSR1 kills torchrun, and with one process
`accelerate launch` forwards nothing; so `run` signals the trainers itself and gives back the exit
code that the run wrote to its outcome.json.
"""

import argparse
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from launch.job import Job, JobError, mapping

TOPOLOGIES = Path("configs/accelerate")
WITH_DRY_RUN = ("pipeline.train",)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Command:
    """An argument list, and what it needs in its environment beyond ours."""

    argv: tuple[str, ...]
    env: dict[str, str]

    def __str__(self) -> str:
        """One line for a shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*assignments, shlex.join(self.argv)])


class Local:
    """This machine."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options that only this place has."""
        add = parser.add_argument
        add("--processes", type=int, default=1, help="one per GPU or core (%(default)s)")
        add("--device", choices=["cpu", "gpu"], default="cpu", help="(%(default)s)")

    @classmethod
    def from_arguments(cls, _arguments: argparse.Namespace) -> "Local":
        """Nothing about this machine needs to be said."""
        return cls()

    def job(self, arguments: argparse.Namespace, overrides: tuple[str, ...]) -> Job:
        """The job that the command line describes."""
        return Job(
            module=arguments.module,
            config=arguments.config,
            overrides=overrides,
            num_processes=arguments.processes,
            device=arguments.device,
            strategy=arguments.strategy,
            topology=arguments.topology,
            num_threads=arguments.threads,
        )

    def command(self, job: Job) -> Command:
        """What `run` runs."""
        return command(job)

    def run(self, job: Job) -> int:
        """Run the job to its end and return its exit code."""
        return run(job)


def topology(job: Job) -> Path:
    """The accelerate file that a job asks for, or the one that fits strategy, nodes and device."""
    if job.topology is not None:
        return job.topology
    if job.strategy is not None and job.strategy != "ddp":
        path = TOPOLOGIES / f"{job.strategy}.yaml"
    elif job.num_nodes > 1:
        path = TOPOLOGIES / "multi-node.yaml"
    elif job.device == "cpu" and job.num_processes == 1:
        path = TOPOLOGIES / "single-cpu.yaml"
    else:
        path = TOPOLOGIES / f"{job.device}-ddp.yaml"
    if not path.is_file():
        raise JobError(
            f"{path} does not exist here: start in the project's root, or give --topology."
        )
    return path


def uses_deepspeed(topology: Path) -> bool:
    """Whether an accelerate file starts DeepSpeed."""
    return mapping(topology.read_text(encoding="utf-8")).get("distributed_type") == "DEEPSPEED"


def launcher(topology: Path, num_processes: int) -> tuple[str, ...]:
    """`accelerate launch` of this Python, up to where the script or `-m module` goes."""
    accelerate = (sys.executable, "-m", "accelerate.commands.launch")
    return (*accelerate, "--config_file", str(topology), "--num_processes", str(num_processes))


def environment(job: Job) -> dict[str, str]:
    """What the processes need: the device, threads per process, and the job's own variables."""
    env = {"OMP_NUM_THREADS": str(job.num_threads)}
    if job.device == "gpu":
        env["LATENTMILL_DEVICE"] = "gpu"  # no GPU there is a mistake then, not a reason to be slow
    if job.device == "cpu" and uses_deepspeed(topology(job)):
        # Told to stay on the CPU, accelerate leaves DeepSpeed out, silently: we hide the GPUs.
        env |= {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    elif job.device == "cpu":
        # Without it, processes of a MULTI_GPU topology on a CPU machine each believe to be alone.
        env["ACCELERATE_USE_CPU"] = "true"
    return env | dict(job.env)


def command(job: Job) -> Command:
    """What runs `job` on this machine."""
    argv = (*launcher(topology(job), job.num_processes), "-m", job.module, *job.arguments)
    return Command(argv, environment(job))


def check(job: Job) -> int:
    """Let one process read the config and exit; a mistake is told once, without any launcher."""
    argv = [sys.executable, "-m", job.module, *job.arguments, "--dry-run"]
    env = os.environ | environment(job)
    return subprocess.run(argv, env=env, stdout=subprocess.DEVNULL, check=False).returncode


def run(job: Job) -> int:
    """Run the job to its end; its exit code is the one that the run wrote to outcome.json."""
    if job.module in WITH_DRY_RUN and (code := check(job)):
        return code
    run_dir = job.run_dir()
    before = _outcome_stamp(run_dir)
    what = command(job)
    # A session of its own: Ctrl-C in the terminal reaches the trainers through us, once.
    process = subprocess.Popen(
        what.argv, env=os.environ | what.env, start_new_session=True, preexec_fn=_end_with_us
    )
    with _forwarding(process):
        launcher_code = process.wait()
    if run_dir is None or _outcome_stamp(run_dir) == before:
        return 1 if launcher_code < 0 else launcher_code
    code = json.loads((run_dir / "outcome.json").read_bytes())["exit_code"]
    return 1 if code is None else int(code)  # None: it was killed while it ran


def _end_with_us() -> None:
    """Ask Linux, in the child, for a SIGTERM when this process dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, linux/prctl.h


def _outcome_stamp(run_dir: Path | None) -> tuple[int, int] | None:
    """What changes when outcome.json is written anew; None while there is none."""
    if run_dir is None:
        return None
    try:
        status = (run_dir / "outcome.json").stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def trainers(launcher_pid: int) -> Sequence[psutil.Process]:
    """The processes that the launcher started: one per rank, without what these started."""
    try:
        return psutil.Process(launcher_pid).children()
    except psutil.NoSuchProcess:
        return []


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Generator[None]:
    """While inside, stop signals go to all trainers; a second Ctrl-C ends everything at once."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        impatient = number == signal.SIGINT and signal.SIGINT in received
        received.append(number)
        ranks = trainers(process.pid)
        for rank in ranks:
            try:
                rank.send_signal(signal.SIGKILL if impatient else number)
            except psutil.NoSuchProcess:  # it has ended since it was listed
                continue
        if impatient or not ranks:  # nobody to save anything: the launcher itself may go
            process.kill() if impatient else process.terminate()

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
