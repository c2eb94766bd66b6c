"""A Job on a Slurm cluster: the text of its sbatch script, and its submission.

    Job, Allocation -> command() -> sbatch -> on every node one `accelerate launch`

Training: before the time limit (or when a job of higher priority takes the nodes) Slurm sends
SIGUSR1 to the script. The script touches STOP in the run directory, the trainers save and end, and
the script requeues the job: the same command resumes. After scancel's SIGTERM the trainers save,
and the job ends. Export: an array with one node per element, which may be killed at any time.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import cluster, local
from launch.cluster import Allocation
from launch.job import EXPORT, Job, JobError
from launch.slurm_script import (
    AFTER_EXPORT,
    AFTER_TRAINING,
    BEFORE_TRAINING,
    READ_ENV_FILE,
    RENDEZVOUS,
)

SECRET_REMEDY = (
    "write {name}=... into a file that only you can read, and give --env-file FILE, which is read "
    "on the node."
)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A Slurm cluster."""

    allocation: Allocation
    partition: str | None = None
    options: tuple[str, ...] = ()  # passed to sbatch as they are
    env_file: Path | None = None  # assignments of the shell
    image: str | None = None  # of a container, by pyxis, NVIDIA's plugin of Slurm
    mounts: str | None = None  # of the container, besides ours, as pyxis takes them

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of every cluster, and those of Slurm."""
        groups = cluster.add_arguments(parser, "container")
        groups["machines"]("--partition", help="queue of the job (default: the cluster's)")
        text = "another option of sbatch, e.g. account=physics; repeatable"
        groups["job"]("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help=text)
        add = groups["container"]
        text = "image with latentmill, as pyxis names it: REGISTRY#IMAGE, or ./FILE.sqsh"
        add("--container-image", metavar="IMAGE", help=text)
        text = "what it sees besides the current folder and run_dir: SOURCE:TARGET, with commas"
        add("--container-mounts", metavar="MOUNTS", help=text)
        text = "assignments of the shell, for keys: WANDB_API_KEY=...; read on the node"
        groups["environment"]("--env-file", type=Path, metavar="FILE", help=text)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Slurm":
        """The place that the command line describes."""
        if arguments.container_mounts and not arguments.container_image:
            raise JobError("--container-mounts is of no use without --container-image.")
        return cls(
            allocation=cluster.allocation_of(arguments),
            partition=arguments.partition,
            options=tuple(map(_sbatch_option, arguments.sbatch)),
            env_file=arguments.env_file,
            image=arguments.container_image,
            mounts=arguments.container_mounts,
        )

    def job(self, arguments: argparse.Namespace, overrides: tuple[str, ...]) -> Job:
        """The job that the command line describes."""
        return cluster.job_of(arguments, overrides, SECRET_REMEDY)

    def command(self, job: Job) -> str:
        """The script for sbatch."""
        is_export = job.module == EXPORT
        node = cluster.rendezvous_of(job)
        settings = {"MAX_RESTARTS": str(self.allocation.max_restarts)}
        if not is_export:
            settings["RUN_DIR"] = str(cluster.directory(job))
        env = cluster.environment(node, in_image=self.image is not None)
        exports = [f"export {k}={shlex.quote(v)}" for k, v in env.items()]
        assignments = [f"{k}={shlex.quote(v)}" for k, v in settings.items()]
        parts = ["\n".join(["#!/bin/bash", *self._header(job)])]
        if self.env_file is not None:
            # bash would look for a bare name on the PATH.
            path = f"{'' if self.env_file.is_absolute() else './'}{self.env_file}"
            parts += [f"ENV_FILE={shlex.quote(path)}{READ_ENV_FILE}"]
        parts += ["\n".join(["set -u", *exports, *assignments])]
        parts += [RENDEZVOUS] if node.num_nodes > 1 else []
        parts += [] if is_export else [BEFORE_TRAINING]
        parts += [self._srun(node, list(env)) + (AFTER_EXPORT if is_export else AFTER_TRAINING)]
        return "\n\n".join(part.strip("\n") for part in parts)

    def run(self, job: Job) -> int:
        """Check the config and submit the script; return sbatch's exit code."""
        if self.env_file is not None and self.allocation.check_here and not self.env_file.is_file():
            raise JobError(f"--env-file {self.env_file} does not exist.")
        return cluster.submit(
            self.command(job),
            ["sbatch"],
            job=job,
            allocation=self.allocation,
            folder=_log_folder(job),
        )

    def check(self, job: Job) -> int:
        """Print the resolved config, if this machine can check it; return the exit code."""
        return cluster.check(job, self.allocation)

    def _header(self, job: Job) -> Iterator[str]:
        allocation, is_export = self.allocation, job.module == EXPORT
        per_node = job.processes_per_node
        folder = shlex.quote(str(_log_folder(job)))
        size = f"{job.num_nodes} x {per_node} processes"
        yield f"# {job.module} on {size}. In the folder where relative paths start:"
        yield f"#   mkdir -p {folder} && sbatch THIS_FILE"
        options = [f"--job-name={allocation.name}"]
        if is_export:
            options += [f"--array=0-{job.num_nodes - 1}", "--nodes=1"]
        else:
            options += [f"--nodes={job.num_nodes}"]
        options += ["--ntasks-per-node=1"]
        options += [f"--cpus-per-task={per_node * allocation.cpus_per_process}"]
        # A site may want another option for GPUs, such as gres=gpu:h100:8.
        asks_for_gpus = any(re.match(r"--gres=.*gpu|--gpus|-G", one) for one in self.options)
        if job.device == "gpu" and not asks_for_gpus:
            options += [f"--gpus-per-node={per_node}"]
        options += [f"--time={_time(allocation.seconds)}"] if allocation.seconds else []
        options += [f"--partition={self.partition}"] if self.partition else []
        options += [f"--signal=B:USR1@{allocation.grace_seconds}", "--requeue"]
        options += ["--open-mode=append", f"--output={shlex.quote(_log(job))}", *self.options]
        for option in options:
            if len(option.splitlines()) > 1:
                raise JobError(f"{option!r} is no option for sbatch: it holds a line break.")
            yield f"#SBATCH {option}"

    def _srun(self, job: Job, variables: Sequence[str]) -> str:
        """The command that starts accelerate once on every node, in the background.

        scancel's SIGTERM reaches every process of a node. The trainers save; accelerate ignores it:
        otherwise it would die at once, and Slurm would kill the task with its trainers.
        """
        # srun does not inherit the cores from sbatch; the variables it does not where a site has
        # set SBATCH_EXPORT=NONE.
        cpus = job.processes_per_node * self.allocation.cpus_per_process
        srun = ["srun", "--kill-on-bad-exit=1", "--wait=60", f"--cpus-per-task={cpus}"]
        python, module = shlex.quote(sys.executable), "accelerate.commands.launch"
        topology = local.topology(job).absolute()
        deepspeed = local.deepspeed_file(topology)
        lines = [shlex.join([*srun, "--export=ALL"])]
        if self.image is not None:
            python = "python"  # the image's
            files = [path for path in (job.config, topology, deepspeed) if path is not None]
            lines += self._container(_log_folder(job), files, variables)
        if job.module == EXPORT:
            lines += [f"{python} -m {module}"]
        else:
            # SLURM_NODEID is set in the task's own shell.
            node = ' --machine_rank "$SLURM_NODEID"' if job.num_nodes > 1 else ""
            inner = f"""trap "" TERM; exec "$0" -m {module}{node} "$@\""""
            lines += [f"bash -c {shlex.quote(inner)} {python}"]
        lines += [shlex.join(cluster.launcher(job, topology, deepspeed))]
        if job.num_nodes > 1:
            lines += ['--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"']
        lines += [f"-m {job.module} {shlex.join(job.arguments)}"]
        return " \\\n    ".join(lines) + " &"

    def _container(
        self, folder: Path, files: Sequence[Path], variables: Sequence[str]
    ) -> Iterator[str]:
        """Options of srun for pyxis: the container sees its paths as they are outside.

        folder: what the job writes to. files: what it reads. variables: those of the script, which
        the image's own would overrule otherwise.
        """
        if ".." in folder.parts:
            raise JobError(f"{folder} leads out of the container: write it as an absolute path.")
        mounts = [f"{path}:{path}" for path in (folder, *files) if path.is_absolute()]
        mounts += [self.mounts] if self.mounts else []
        yield shlex.join([f"--container-image={self.image}"])
        # $PWD is the folder that the job starts in, where relative paths begin.
        yield '--container-workdir="$PWD"'
        yield f'--container-mounts="$PWD:$PWD",{shlex.quote(",".join(mounts))}'
        yield f"--container-env={','.join(variables)}"


def _sbatch_option(text: str) -> str:
    """An option for a line of #SBATCH, from account=physics or --account=physics.

    A value with spaces is quoted, unless the user has done so.
    """
    option = text if text.startswith("-") else f"--{text}"
    name, _, value = option.partition("=")
    if re.search(r"[\s#]", value) and not re.search(r"""["'\\]""", value):
        option = f"{name}={shlex.quote(value)}"
    if re.match(r"--(nodes|ntasks)\b|-[Nn]", option):
        raise JobError(
            f"--sbatch {text}: use --nodes and --gpus-per-node, which the script counts on."
        )
    return option


def _log_folder(job: Job) -> Path:
    """The folder for a job's output: the run directory, or the one that holds the export."""
    folder = cluster.directory(job)
    assert folder is not None, "job_of has checked it"
    return folder.parent if job.module == EXPORT else folder  # an export owns its directory


def _log(job: Job) -> str:
    """The output file in Slurm's notation: %x job name, %j or %A job id, %a element, %% for %."""
    folder = str(_log_folder(job)).replace("%", "%%")
    if job.module == EXPORT:
        return f"{folder}/%x-slurm-%A_%a.out"
    return f"{folder}/slurm-%j.out"


def _time(seconds: int) -> str:
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
