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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launch import cluster, local
from launch.cluster import Allocation
from launch.job import EXPORT, Job, JobError

RENDEZVOUS = r"""
# The address of the rendezvous: the one by which Slurm reaches the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do # the port is in use
    ((MASTER_PORT++))
done
export MASTER_ADDR MASTER_PORT
"""

BEFORE_TRAINING = r"""
# How this start ended, from outcome.json; empty if the run wrote none.
stamp() { stat --format='%i %y' "$RUN_DIR/outcome.json" 2>/dev/null; }
before=$(stamp)
outcome() {
    [[ $(stamp) == "$before" ]] && return
    sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p' "$RUN_DIR/outcome.json"
}

# The file STOP reaches every trainer; srun swallows signals, and accelerate dies of them. It is
# touched until all have ended: a trainer that has just started removes an older STOP.
stop() {
    while kill -0 "$step" 2>/dev/null; do
        touch "$RUN_DIR/STOP"
        sleep 1
    done
}

mkdir -p "$RUN_DIR"
rm -f "$RUN_DIR/STOP"
"""

AFTER_TRAINING = r"""
step=$!
wanted_back=
trap 'wanted_back=yes; stop' USR1 # time limit or preemption: save and requeue
trap stop TERM # scancel: save and end

# srun runs in the background, since bash runs traps only between commands or in `wait`.
wait "$step"
code=$?
if ((code > 128)); then # `wait` was interrupted by a trap
    wait "$step"
    code=$?
fi
rm -f "$RUN_DIR/STOP"

if [[ $(outcome) != preempted ]]; then
    exit "$code"
elif [[ ! $wanted_back ]]; then
    echo "stopped; sbatch resumes it" >&2
elif ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
    echo "preempted, and not queued again after $MAX_RESTARTS restarts; sbatch resumes it" >&2
else
    scontrol requeue "$SLURM_JOB_ID"
fi
exit 3
"""

AFTER_EXPORT = r"""
step=$!
# Nothing to save: the next start repeats unfinished tasks only.
again() {
    if ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "out of time, and not queued again after $MAX_RESTARTS restarts" >&2
        kill "$step"
        exit 3
    fi
}
trap again USR1
wait "$step"
"""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A Slurm cluster."""

    allocation: Allocation
    partition: str | None = None
    options: tuple[str, ...] = ()  # passed to sbatch as they are

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of every cluster, and those of Slurm."""
        cluster.add_arguments(parser)
        parser.add_argument("--partition", help="queue of the job (default: the cluster's)")
        parser.add_argument(
            "--sbatch",
            action="append",
            default=[],
            metavar="OPTION",
            help="another option of sbatch, e.g. --sbatch=--account=physics; repeatable",
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Slurm":
        """The place that the command line describes."""
        return cls(
            allocation=cluster.allocation_of(arguments),
            partition=arguments.partition,
            options=tuple(arguments.sbatch),
        )

    def __post_init__(self) -> None:
        for option in self.options:
            if not re.fullmatch(r"--?[a-z][^\n]*", option):
                raise JobError(f"--sbatch {option!r} is not an option: write --sbatch=--x=y.")

    def job(self, arguments: argparse.Namespace, overrides: tuple[str, ...]) -> Job:
        """The job that the command line describes."""
        return cluster.job_of(arguments, overrides)

    def command(self, job: Job) -> str:
        """The script for sbatch."""
        is_export = job.module == EXPORT
        node = replace(job, num_nodes=1, num_processes=job.processes_per_node) if is_export else job
        settings = {"MAX_RESTARTS": str(self.allocation.max_restarts)}
        if not is_export:
            settings["RUN_DIR"] = str(cluster.directory(job))
        exports = [f"export {k}={shlex.quote(v)}" for k, v in cluster.environment(node).items()]
        assignments = [f"{k}={shlex.quote(v)}" for k, v in settings.items()]
        parts = ["\n".join(["#!/bin/bash", *self._header(job)])]
        parts += ["\n".join(["set -u", *exports, *assignments])]
        parts += [RENDEZVOUS] if node.num_nodes > 1 else []
        parts += [] if is_export else [BEFORE_TRAINING]
        parts += [_srun(node, self.allocation) + (AFTER_EXPORT if is_export else AFTER_TRAINING)]
        return "\n\n".join(part.strip("\n") for part in parts)

    def run(self, job: Job) -> int:
        """Check the config and submit the script; return sbatch's exit code."""
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
        options += [f"--gpus-per-node={per_node}"] if job.device == "gpu" else []
        options += [f"--time={_time(allocation.seconds)}"] if allocation.seconds else []
        options += [f"--partition={self.partition}"] if self.partition else []
        options += [f"--signal=B:USR1@{allocation.grace_seconds}", "--requeue"]
        options += ["--open-mode=append", f"--output={shlex.quote(_log(job))}", *self.options]
        yield from (f"#SBATCH {option}" for option in options)


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


def _srun(job: Job, allocation: Allocation) -> str:
    """The command that starts accelerate once on every node, in the background.

    scancel's SIGTERM reaches every process of a node. The trainers save; accelerate ignores it:
    otherwise it would die at once, and Slurm would kill the task with its trainers.
    """
    # srun does not inherit it from sbatch.
    cpus = job.processes_per_node * allocation.cpus_per_process
    srun = ["srun", "--kill-on-bad-exit=1", "--wait=60", f"--cpus-per-task={cpus}"]
    python, module = shlex.quote(sys.executable), "accelerate.commands.launch"
    topology = local.topology(job).absolute()
    options = [shlex.join(cluster.launcher(job, topology, local.deepspeed_file(topology)))]
    if job.module == EXPORT:
        start = f"{python} -m {module}"
    else:
        # SLURM_NODEID is set in the task's own shell.
        node = ' --machine_rank "$SLURM_NODEID"' if job.num_nodes > 1 else ""
        inner = f"""trap "" TERM; exec "$0" -m {module}{node} "$@\""""
        start = f"bash -c {shlex.quote(inner)} {python}"
    if job.num_nodes > 1:
        options += ['--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"']
    lines = [
        shlex.join(srun),
        start,
        *options,
        f"-m {job.module} {shlex.join(job.arguments)}",
    ]
    return " \\\n    ".join(lines) + " &"
