"""What Slurm and Kubernetes have in common.

options of the command line -> Job, Allocation -> one `accelerate launch` per machine
                                               -> environment of its processes
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from launch import local
from launch.job import EXPORT, Job, JobError
from pipeline.common.console import progress

MAX_NAME = 50  # a DNS label has at most 63 characters, which include "-" and the index of a pod
# PyTorch's NCCL flight recorder: dumps the last collectives when one hangs.
FLIGHT_RECORDER = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "20000",
    "NCCL_DEBUG": "WARN",
}
# Names of variables that hold keys: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, PGPASSWORD.
SECRET = re.compile(
    r"(PASSWORD|SECRET|CONNECTION_STRING|(^|_)TOKEN|(API|ACCESS|PRIVATE|STORAGE)_?KEY)$",
    re.IGNORECASE,
)
Groups = Mapping[str, Callable[..., argparse.Action]]  # of --help: title -> adds an option


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What to ask a cluster for besides machines, and how it may end the job."""

    name: str
    cpus_per_process: int
    seconds: int | None  # time limit; None = the cluster's own
    grace_seconds: int  # from the signal before the time limit to the end
    max_restarts: int
    check_here: bool = True  # let one process check config and data before submitting

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", self.name) or len(self.name) > MAX_NAME:
            raise JobError(
                f"--name {self.name!r} is not a valid name for a job: use at most {MAX_NAME} "
                "lower-case letters, digits and dashes; the first a letter, the last no dash."
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
                f"{self.grace_seconds} s for saving: no time is left for training. Raise --time, "
                "or lower --grace."
            )


def add_arguments(parser: argparse.ArgumentParser, *more: str) -> Groups:
    """Add the options of every cluster; return the groups of --help, with `more` behind them."""
    titles = ("machines", "job", *more, "environment")
    groups = {title: parser.add_argument_group(title).add_argument for title in titles}
    add = groups["machines"]
    add("--nodes", type=int, default=1, metavar="N", help="machines (%(default)s)")
    add(
        *("--gpus-per-node", "--processes-per-node"),
        dest="processes_per_node",
        metavar="M",
        type=int,
        default=1,
        help="processes on each machine, one per GPU (%(default)s)",
    )
    text = "cores of each process (%(default)s)"
    add("--cpus-per-process", type=int, default=4, metavar="N", help=text)
    add("--device", choices=["cpu", "gpu"], default="gpu", help="what computes (%(default)s)")
    add = groups["job"]
    add("--name", help="name of the job (default: from the config's file name)")
    text = "time limit (Slurm: of each start; default: the cluster's)"
    add("--time", metavar="HH:MM:SS", help=text)
    text = "for saving before the job ends (%(default)s)"
    add("--grace", type=int, default=120, metavar="SECONDS", help=text)
    text = "restarts after the first start (%(default)s)"
    add("--max-restarts", type=int, default=10, metavar="N", help=text)
    add("--unchecked", action="store_true", help="submit without checking config and data here")
    groups["environment"](
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable of all processes, e.g. NCCL_SOCKET_IFNAME=eth0; repeatable",
    )
    return groups


def job_of(arguments: argparse.Namespace, overrides: tuple[str, ...], secret_remedy: str) -> Job:
    """The job that the options describe; raises JobError for wrong values.

    secret_remedy: how this place gets a variable whose value must not stand in a text.
    """
    if arguments.processes_per_node < 1:
        raise JobError(f"--gpus-per-node must be at least 1, not {arguments.processes_per_node}.")
    env = dict(variable(text) for text in arguments.env)
    for name in (name for name, value in env.items() if value and SECRET.search(name)):
        raise JobError(
            f"--env {name}=... looks like a secret, and its value would stand in a text that "
            f"others can read: {secret_remedy.format(name=name)}"
        )
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
            "The job on the cluster reads its stop file and writes its outcome there."
        )
    return job


def allocation_of(arguments: argparse.Namespace) -> Allocation:
    """What the options ask the cluster for."""
    return Allocation(
        name=arguments.name or name_from(arguments.config),
        cpus_per_process=arguments.cpus_per_process,
        seconds=None if arguments.time is None else seconds_of(arguments.time),
        grace_seconds=arguments.grace,
        max_restarts=arguments.max_restarts,
        check_here=not arguments.unchecked,
    )


def variable(text: str) -> tuple[str, str]:
    """NAME and VALUE of `--env NAME=VALUE`; a mistake is reported without VALUE, maybe a secret."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise JobError(f"--env {name!r} is not a variable: write NAME=VALUE.")
    return name, value


def name_from(config: Path) -> str:
    """The name of a job by its config: configs/train/beta_vae.yaml gives beta-vae."""
    name = re.sub(r"[^a-z0-9]+", "-", config.stem.lower()).strip("-")
    return name[:MAX_NAME].rstrip("-") if name[:1].isalpha() else f"job-{name}"[:MAX_NAME]


def seconds_of(time: str) -> int:
    """Seconds in HH:MM:SS or, as Slurm writes it, D-HH:MM:SS."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", time, re.ASCII)
    if match is None:
        raise JobError(f"--time {time!r} is not a time: write HH:MM:SS or D-HH:MM:SS.")
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check(job: Job, allocation: Allocation) -> int:
    """Print the resolved config, if this machine can check it; returns the exit code."""
    if job.module == EXPORT and job.device == "gpu":
        progress("not checked: an export on GPUs is planned on a machine that has them")
        return 0
    return local.check(job, is_shown=True) if allocation.check_here else 0


def submit(
    text: str,
    argv: Sequence[str],
    *,
    job: Job,
    allocation: Allocation,
    folder: Path | None = None,
) -> int:
    """Check the config, then pass `text` to a program of the cluster; returns an exit code.

    folder: created first, if given.
    """
    if shutil.which(argv[0]) is None:
        raise JobError(
            f"--submit needs {argv[0]}, which is not on the PATH of this machine: submit from a "
            "machine of the cluster, or leave out --submit and copy the text there."
        )
    if allocation.check_here and job.module != EXPORT and (code := local.check(job)):
        print(
            "Nothing was submitted. If only the cluster can read the data, add --unchecked: then "
            "the job checks the config.",
            file=sys.stderr,
        )
        return code
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(argv, input=text, text=True, check=False).returncode


def setting_of_directory(job: Job) -> str:
    """The setting of a job's config that names the directory it writes to.

    For an export to a URL that is the run's directory, for logs only.
    """
    if job.module != EXPORT:
        return "run_dir"
    return "run" if "://" in (job.value("out") or "") else "out"


def directory(job: Job) -> Path | None:
    """The directory that a job writes to; None if its config names none."""
    return job.path(setting_of_directory(job))


def environment(job: Job, *, in_image: bool = False) -> dict[str, str]:
    """The variables of all processes: NCCL's flight recorder and `local.environment`.

    in_image: the processes run in a container, which has latentmill installed.
    """
    several_gpus = job.device == "gpu" and job.num_processes > 1 and job.module != EXPORT
    env: dict[str, str] = {}
    if several_gpus:
        env |= FLIGHT_RECORDER
        env["TORCH_FR_DUMP_TEMP_FILE"] = f"{directory(job)}/nccl_trace_rank_"
    env |= local.environment(job)
    if in_image and "PYTHONPATH" not in job.env:
        env.pop("PYTHONPATH", None)  # a path of this machine
    return env


def rendezvous_of(job: Job) -> Job:
    """The part of a job whose processes meet: a whole training, or one machine of an export."""
    if job.module != EXPORT:
        return job
    return replace(job, num_nodes=1, num_processes=job.processes_per_node)


def launcher(job: Job, topology: PurePath, deepspeed: PurePath | None) -> list[str]:
    """Options of `accelerate launch` that all machines share: all but rank and address.

    topology, deepspeed: accelerate's file and DeepSpeed's settings, by their paths on the machines.
    """
    words = local.launcher_options(topology, deepspeed, job.num_processes)
    if job.num_nodes > 1:
        words += ["--num_machines", str(job.num_nodes)]
        if local.uses_deepspeed(local.topology(job)):
            # DeepSpeed's other launchers need ssh between the machines.
            words += ["--deepspeed_multinode_launcher", "standard"]
    return words
