"""What every cluster needs of a job, whichever scheduler hands out its machines.

options of the command line -> Job, Allocation -> one `accelerate launch` per machine
                                               -> environment of its processes
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from launch import local
from launch.job import EXPORT, Job, JobError
from pipeline.common.console import progress

MAX_NAME = 50  # of 63 characters that a DNS label may have: room for "-" and the index of a pod
# Of PyTorch's NCCL flight recorder: what the last collectives were, dumped when one hangs.
FLIGHT_RECORDER = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "20000",
    "NCCL_DEBUG": "WARN",
}


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What to ask a cluster for besides machines, and how it may take it back."""

    name: str
    cpus_per_process: int
    seconds: int | None  # time limit; None = the cluster's own
    grace_seconds: int  # from the warning that the time is over to the end
    max_restarts: int
    check_here: bool = True  # let one process read the config and its data before handing in

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", self.name) or len(self.name) > MAX_NAME:
            raise JobError(
                f"--name {self.name!r} is no name for a job: take at most {MAX_NAME} lower-case "
                "letters, digits and dashes, the first a letter, the last no dash."
            )
        for option, value, least in (
            ("--cpus-per-process", self.cpus_per_process, 1),
            ("--grace", self.grace_seconds, 1),
            ("--max-restarts", self.max_restarts, 0),
        ):
            if value < least:
                raise JobError(f"{option} must be at least {least}, not {value}.")
        if self.seconds is not None and self.seconds <= self.grace_seconds:
            raise JobError(
                f"--time gives the job {self.seconds} s, of which --grace takes "
                f"{self.grace_seconds} s for saving: nothing is left to train in. Ask for more "
                "time, or less grace."
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all clusters have in common."""
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="machines (%(default)s)")
    add(
        *("--gpus-per-node", "--processes-per-node"),
        dest="processes_per_node",
        metavar="M",
        type=int,
        default=1,
        help="processes on each machine, one per GPU (%(default)s)",
    )
    add("--cpus-per-process", type=int, default=4, help="cores of each process (%(default)s)")
    add("--device", choices=["cpu", "gpu"], default="gpu", help="(%(default)s)")
    add(
        "--time",
        metavar="HH:MM:SS",
        help="time limit (Slurm: of each start); the cluster's if not said",
    )
    add("--grace", type=int, default=120, help="seconds to save in at its end (%(default)s)")
    add("--max-restarts", type=int, default=10, help="starts after the first one (%(default)s)")
    add("--name", help="of the job (from the file name of the config)")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable for all processes, such as NCCL_SOCKET_IFNAME=eth0; may be repeated",
    )
    add("--unchecked", action="store_true", help="hand in what only the cluster can check")


def job_of(arguments: argparse.Namespace, overrides: tuple[str, ...]) -> Job:
    """The job that a cluster's options describe; raises JobError if they make no sense."""
    if arguments.processes_per_node < 1:
        raise JobError(f"--gpus-per-node must be at least 1, not {arguments.processes_per_node}.")
    env = dict(variable(text) for text in arguments.env)
    job = Job(
        module=arguments.module,
        config=arguments.config,
        overrides=overrides,
        options=arguments.options,
        num_processes=max(arguments.nodes, 1) * arguments.processes_per_node,
        num_nodes=arguments.nodes,
        device=arguments.device,
        strategy=arguments.strategy,
        topology=arguments.topology,
        num_threads=arguments.threads,
        env=env,
    )
    if directory(job) is None:
        raise JobError(
            f"{job.config} names no {setting_of_directory(job)}: set it there, or as an override. "
            "It is where the job on the cluster is told to stop, and says how it ended."
        )
    return job


def allocation_of(arguments: argparse.Namespace) -> Allocation:
    """What a cluster's options ask for."""
    return Allocation(
        name=arguments.name or name_from(arguments.config),
        cpus_per_process=arguments.cpus_per_process,
        seconds=None if arguments.time is None else seconds_of(arguments.time),
        grace_seconds=arguments.grace,
        max_restarts=arguments.max_restarts,
        check_here=not arguments.unchecked,
    )


def variable(text: str) -> tuple[str, str]:
    """NAME and VALUE of `--env NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise JobError(f"--env {text!r} is no variable: write NAME=VALUE.")
    return name, value


def name_from(config: Path) -> str:
    """A job's name after its config: configs/train/beta_vae.yaml gives beta-vae."""
    name = re.sub(r"[^a-z0-9]+", "-", config.stem.lower()).strip("-")
    return name[:MAX_NAME].rstrip("-") if name[:1].isalpha() else f"job-{name}"[:MAX_NAME]


def seconds_of(time: str) -> int:
    """Seconds in HH:MM:SS or, as Slurm writes it, D-HH:MM:SS."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", time, re.ASCII)
    if match is None:
        raise JobError(f"--time {time!r} is no time: write HH:MM:SS or D-HH:MM:SS, as in 08:00:00.")
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check(job: Job, allocation: Allocation) -> int:
    """Print what one process makes of the config, if it can tell here; returns the exit code."""
    if job.module == EXPORT and job.device == "gpu":
        progress("not checked: the plan of an export on GPUs is made where these are")
        return 0
    return local.check(job, is_shown=True) if allocation.check_here else 0


def hand_in(
    text: str,
    argv: Sequence[str],
    *,
    job: Job,
    allocation: Allocation,
    folder: Path | None = None,
) -> int:
    """Give `text` to a program of the cluster after a check of the config; returns an exit code.

    folder: made before, if the program needs it.
    """
    if shutil.which(argv[0]) is None:
        raise JobError(
            f"--submit needs {argv[0]}, which is not on the PATH of this machine: submit from one "
            "that can reach the cluster, or leave --submit out and take the text there."
        )
    if allocation.check_here and job.module != EXPORT and (code := local.check(job)):
        print(
            f"Nothing was given to {argv[0]}. If only the cluster can read the data, --unchecked "
            "leaves the check to the job.",
            file=sys.stderr,
        )
        return code
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(argv, input=text, text=True, check=False).returncode


def setting_of_directory(job: Job) -> str:
    """The setting of a job's config that says where on disk it writes.

    For an export to a URL that is the run's directory, which takes nothing but logs.
    """
    if job.module != EXPORT:
        return "run_dir"
    return "run" if "://" in (job.value("out") or "") else "out"


def directory(job: Job) -> Path | None:
    """Where a job writes, as its config says; None if it does not."""
    return job.path(setting_of_directory(job))


def environment(job: Job) -> Mapping[str, str]:
    """What the processes need, on every machine: NCCL's black box beside `local.environment`."""
    several_gpus = job.device == "gpu" and job.num_processes > 1 and job.module != EXPORT
    recorder: dict[str, str] = {}
    if several_gpus:
        recorder = FLIGHT_RECORDER | {
            "TORCH_FR_DUMP_TEMP_FILE": f"{directory(job)}/nccl_trace_rank_"
        }
    return recorder | local.environment(job)


def launcher(job: Job, topology: PurePath, deepspeed: PurePath | None) -> list[str]:
    """Options of `accelerate launch` on all machines alike: all but rank and meeting point.

    topology, deepspeed: accelerate's file, and what it names of DeepSpeed's, as the machines see
    them.
    """
    words = local.launcher_options(topology, deepspeed, job.num_processes)
    if job.num_nodes > 1:
        words += ["--num_machines", str(job.num_nodes)]
        if local.uses_deepspeed(local.topology(job)):
            # DeepSpeed's other ways to start need ssh between the machines.
            words += ["--deepspeed_multinode_launcher", "standard"]
    return words
