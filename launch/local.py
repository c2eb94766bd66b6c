"""A Job on this machine: argv and environment of `accelerate launch`, and running it to its end.

    Job -> command(job) -> `accelerate launch` -> trainers -> outcome.json -> exit code

torchrun turns every exit code into 1 and dies of SIGUSR1, and with one process `accelerate launch`
forwards no signal; so `run` signals the trainers itself and returns the exit code that the run
wrote to its outcome.json.
"""

import argparse
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path, PurePath
from types import FrameType
from typing import Any, cast

import psutil

from launch.gpus import choose
from launch.job import EXPORT, TRAIN, Job, mapping
from pipeline.common.arguments import add_processes
from pipeline.common.console import progress
from pipeline.common.shipped import find, shipped

OURS = Path(__file__).with_name("__init__.py")
PACKAGES = OURS.parents[1]  # the folder of `launch` and `pipeline`
QUIET = Path(__file__).with_name("quiet.py")
WITH_DRY_RUN = (TRAIN, EXPORT)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Command:
    """An argument list, and the variables to add to our environment."""

    argv: tuple[str, ...]
    env: dict[str, str]

    def __str__(self) -> str:
        """As one line of a shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*assignments, shlex.join(self.argv)])


class Local:
    """This machine."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of this place."""
        add_processes(parser)

    @classmethod
    def from_arguments(cls, _arguments: argparse.Namespace) -> "Local":
        """Return the place; this machine needs no options."""
        return cls()

    def job(self, arguments: argparse.Namespace, overrides: tuple[str, ...]) -> Job:
        """The job that the command line describes; prints what was chosen for `auto`."""
        processes, device, chosen = choose(arguments.processes, arguments.device, arguments.module)
        job = Job(
            module=arguments.module,
            config=arguments.config,
            overrides=overrides,
            options=arguments.options,
            num_processes=processes,
            device=device,
            strategy=arguments.strategy,
            topology=arguments.topology,
            num_threads=arguments.threads,
        )
        progress(chosen)
        return job

    def command(self, job: Job) -> Command:
        """The command that `run` runs."""
        return command(job)

    def run(self, job: Job) -> int:
        """Run the job to its end and return its exit code."""
        return run(job)

    def check(self, job: Job) -> int:
        """Print the resolved config, or an export's plan; write nothing; return the exit code."""
        return check(job, is_shown=True)


def topology(job: Job) -> Path:
    """The accelerate file of the job, or the one that fits strategy, nodes and device."""
    if job.topology is not None:
        return job.topology
    ours = shipped("accelerate")
    if job.strategy is not None and job.strategy != "ddp":
        return ours[job.strategy]
    if job.num_nodes > 1:
        return ours["multi-node"]
    if job.device == "cpu" and job.num_processes == 1:
        return ours["single-cpu"]
    return ours[f"{job.device}-ddp"]


def uses_deepspeed(topology: Path) -> bool:
    """Whether an accelerate file starts DeepSpeed."""
    return mapping(topology.read_text(encoding="utf-8")).get("distributed_type") == "DEEPSPEED"


def deepspeed_file(topology: Path) -> Path | None:
    """DeepSpeed's settings that an accelerate file names; None if it names none.

    If there is no such file, the shipped settings of that name.
    """
    section = mapping(topology.read_text(encoding="utf-8")).get("deepspeed_config")
    named = cast(dict[str, Any], section).get("deepspeed_config_file") if section else None
    if not isinstance(named, str):
        return None
    path = Path(named)
    return path.absolute() if path.is_file() else find("deepspeed", path.name)


def launcher(topology: Path, num_processes: int) -> tuple[str, ...]:
    """`accelerate launch` of this Python, up to the script or `-m module`."""
    accelerate = (sys.executable, "-m", "accelerate.commands.launch")
    return (*accelerate, *launcher_options(topology, deepspeed_file(topology), num_processes))


def launcher_options(
    topology: PurePath, deepspeed: PurePath | None, num_processes: int
) -> list[str]:
    """The options that name files and processes; `deepspeed` as `deepspeed_file` returns it."""
    words = ["--config_file", str(topology), "--num_processes", str(num_processes)]
    return words if deepspeed is None else [*words, "--deepspeed_config_file", str(deepspeed)]


def import_environment(job: Job) -> dict[str, str]:
    """Variables with which our modules import our packages, whatever the current folder holds.

    PYTHONSAFEPATH keeps the current folder out of the search path. A clone that is not installed is
    added by PYTHONPATH. Modules of the user keep the current folder.
    """
    if not job.module.startswith("pipeline."):
        return {}
    env = {"PYTHONSAFEPATH": "1"}
    finders = [finder for finder in sys.meta_path if finder is not PathFinder]
    specs = [finder.find_spec("launch", None) for finder in finders]  # of an editable installation
    is_editable = any(spec and spec.origin == str(OURS) for spec in specs)
    if PACKAGES.name not in ("site-packages", "dist-packages") and not is_editable:
        before = os.environ.get("PYTHONPATH")
        env["PYTHONPATH"] = os.pathsep.join([str(PACKAGES), *([before] if before else [])])
    return env


def environment(job: Job) -> dict[str, str]:
    """What the processes need: the device, threads per process, and the job's own variables."""
    env = {"OMP_NUM_THREADS": str(job.num_threads)} | import_environment(job)
    if job.device == "gpu":
        env["LATENTMILL_DEVICE"] = "gpu"  # without a GPU, the trainers then end with an error
    if job.device == "cpu" and job.module == EXPORT:
        env |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    elif job.device == "cpu" and uses_deepspeed(topology(job)):
        # With ACCELERATE_USE_CPU, accelerate silently leaves DeepSpeed out; so the GPUs are hidden.
        env |= {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    elif job.device == "cpu":
        # Else each process of a MULTI_GPU topology would train alone on a machine without GPUs.
        env["ACCELERATE_USE_CPU"] = "true"
    return env | job.trial() | dict(job.env)


def command(job: Job) -> Command:
    """The command that runs `job` on this machine."""
    argv = (*launcher(topology(job), job.num_processes), "-m", job.module, *job.arguments)
    return Command(argv, environment(job))


def check(job: Job, *, is_shown: bool = False) -> int:
    """Let one process check the config and exit: it reports a mistake once, before any launcher.

    is_shown: print the resolved config.
    """
    if job.module not in WITH_DRY_RUN:
        return 0
    option = "--check" if job.module == TRAIN and not is_shown else "--dry-run"
    argv = [sys.executable, "-m", job.module, *job.arguments, option]
    env = os.environ | environment(job)
    if job.module == TRAIN:
        env["WORLD_SIZE"] = str(job.num_processes)  # the batch must divide over them
    stdout = None if is_shown else subprocess.DEVNULL
    return subprocess.run(argv, env=env, stdout=stdout, check=False).returncode


def run(job: Job) -> int:
    """Run the job to its end; its exit code is the one that the run wrote to outcome.json."""
    # An export checks its config itself; one process per machine prints the mistake.
    if job.module != EXPORT and (code := check(job)):
        return code
    run_dir = job.run_dir()
    before = _outcome_stamp(run_dir)
    what = command(job)
    # The command as printed, but by quiet.py.
    # In a session of its own, so that Ctrl-C reaches the trainers once, through us.
    process = subprocess.Popen(
        [what.argv[0], "-P", str(QUIET), *what.argv[3:]],
        env=os.environ | what.env,
        start_new_session=True,
        preexec_fn=end_with_us,
    )
    with forwarding(lambda: trainers(process.pid), process):
        launcher_code = process.wait()
    if run_dir is None or _outcome_stamp(run_dir) == before:
        return 1 if launcher_code < 0 else launcher_code
    code = json.loads((run_dir / "outcome.json").read_bytes())["exit_code"]
    return 1 if code is None else int(code)  # None: it was killed


def end_with_us() -> None:
    """Called in a child: Linux sends it SIGTERM when this process dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, linux/prctl.h


def _outcome_stamp(run_dir: Path | None) -> tuple[int, int] | None:
    """Changes when outcome.json is written again; None if it does not exist."""
    if run_dir is None:
        return None
    try:
        status = (run_dir / "outcome.json").stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def trainers(launcher_pid: int) -> Sequence[psutil.Process]:
    """The child processes of the launcher, one per rank, without their own children."""
    try:
        return psutil.Process(launcher_pid).children()
    except psutil.NoSuchProcess:
        return []


@contextmanager
def forwarding(
    find: Callable[[], Sequence[psutil.Process | subprocess.Popen[bytes]]],
    launcher: subprocess.Popen[bytes] | None = None,
) -> Generator[None]:
    """Inside the context, forward stop signals to all processes; a second Ctrl-C kills them.

    find: returns the processes that run by then. launcher: their parent, if not this process.
    """
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        impatient = number == signal.SIGINT and signal.SIGINT in received
        received.append(number)
        ranks = find()
        for rank in ranks:
            try:
                rank.send_signal(signal.SIGKILL if impatient else number)
            except psutil.NoSuchProcess:  # it has ended meanwhile
                continue
        if launcher is not None and (impatient or not ranks):
            # No trainer is left to save: end the launcher.
            launcher.kill() if impatient else launcher.terminate()

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
