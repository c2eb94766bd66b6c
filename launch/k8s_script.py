"""What the container of a pod runs: a script around `accelerate launch`, and a preStop hook."""

import re
import shlex
from pathlib import Path, PurePosixPath

from launch import cluster, local
from launch.job import EXPORT, TRAIN, Job

PORT = 29500
CONFIGS = PurePosixPath("/etc/latentmill")
# Before the command of a training, and after it. Launchers turn exit codes into 1; the run's own is
# in outcome.json, which index 0 writes at its end, and which others may see a little later.
BEFORE_TRAINING = r"""
mkdir -p "$RUN_DIR"
stamp() { stat --format='%i %y' "$RUN_DIR/outcome.json" 2>/dev/null; }
before=$(stamp)
"""
AFTER_TRAINING = r"""
code=$?
((code == 0)) && exit
for _ in {1..10}; do
    if [[ $(stamp) != "$before" ]]; then
        own=$(sed -n 's/.*"exit_code": *\([0-9]*\).*/\1/p' "$RUN_DIR/outcome.json")
        [[ $own ]] && exit "$own"
    fi
    sleep 1
done
exit "$code"
"""
# Repeated until the container ends: a trainer that has just started removes an older STOP.
STOP = 'while mkdir -p "$RUN_DIR" && touch "$RUN_DIR/STOP"; do sleep 1; done'


def files(job: Job) -> dict[str, Path]:
    """The files in CONFIGS, by name."""
    topology = local.topology(cluster.rendezvous_of(job))
    deepspeed = local.deepspeed_file(topology)
    files = {"config.yaml": job.config, "topology.yaml": topology}
    return files if deepspeed is None else files | {"deepspeed.json": deepspeed}


def literal(text: str) -> str:
    """The text, written so that Kubernetes, which replaces $(NAME) and $$, gives it unchanged."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def script(job: Job) -> str:
    """The script of a pod's container."""
    is_export, node = job.module == EXPORT, cluster.rendezvous_of(job)
    deepspeed = CONFIGS / "deepspeed.json" if "deepspeed.json" in files(job) else None
    options = cluster.launcher(node, CONFIGS / "topology.yaml", deepspeed)
    lines = ["python -m accelerate.commands.launch", shlex.join(options)]
    if node.num_nodes > 1:
        lines += ['--machine_rank "$JOB_COMPLETION_INDEX"']
        lines += ['--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"']
    config = CONFIGS / "config.yaml"
    run = literal(shlex.join(["-m", job.module, str(config), *job.overrides, *job.options]))
    lines += [run]
    command = " \\\n    ".join(lines)
    if is_export:
        # `pipeline.export` reads the variables of a Slurm array: the pods imitate one.
        array = {"ID": '"$JOB_COMPLETION_INDEX"', "MIN": 0, "COUNT": job.num_nodes}
        exports = [f"export SLURM_ARRAY_TASK_{name}={value}\n" for name, value in array.items()]
        return f"{''.join(exports)}exec {command}\n"
    parts = [BEFORE_TRAINING.strip("\n"), command, AFTER_TRAINING.lstrip("\n")]
    if job.module == TRAIN:  # a wrong config: exit code 2, before outcome.json exists
        parts.insert(0, f"WORLD_SIZE={job.num_processes} python {run} --check || exit")
    return "\n".join(parts)
