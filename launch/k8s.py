"""A Job on Kubernetes: a manifest of core API objects, and its submission by `kubectl apply`.

    Job, Allocation -> ConfigMap   the config file and its topology
                       Service     headless: a name for every pod
                       Job         Indexed: one pod per machine, restarted together
                    (-> PersistentVolumeClaim)

Before a pod is evicted or deleted, its preStop hook touches STOP in the run directory until the
trainer has saved and ended. The Job starts new pods, and the same command resumes.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from launch import cluster, local
from launch.cluster import Allocation
from launch.job import EXPORT, TRAIN, Job, JobError

PORT = 29500
USER = 10001  # in the image, see docker/Dockerfile
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


class _Dumper(yaml.SafeDumper):
    """Writes multi-line texts as YAML blocks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """A Kubernetes cluster."""

    allocation: Allocation
    image: str
    claim: str  # PersistentVolumeClaim of the run directory
    claim_size: str | None  # size of a claim to create; None = the claim exists
    mount: PurePosixPath  # path of the claim in the container
    memory: str | None
    shm: str
    namespace: str | None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of every cluster, and those of Kubernetes."""
        cluster.add_arguments(parser)
        add = parser.add_argument
        add("--image", required=True, help="container image with latentmill, e.g. of docker/")
        add("--claim", required=True, help="PersistentVolumeClaim that holds the run directory")
        add("--claim-size", help="create the claim with this size, e.g. 100Gi")
        add(
            "--mount",
            type=PurePosixPath,
            default="/data",
            help="path of the claim in the container (%(default)s)",
        )
        add("--memory", help="memory of each pod, e.g. 64Gi")
        add("--shm", default="8Gi", help="limit of /dev/shm, part of the memory (%(default)s)")
        add("--namespace", help="default: kubectl's current one")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Kubernetes":
        """The place that the command line describes."""
        return cls(
            allocation=cluster.allocation_of(arguments),
            image=arguments.image,
            claim=arguments.claim,
            claim_size=arguments.claim_size,
            mount=PurePosixPath(arguments.mount),
            memory=arguments.memory,
            shm=arguments.shm,
            namespace=arguments.namespace,
        )

    def __post_init__(self) -> None:
        for option, size in (
            ("--claim-size", self.claim_size),
            ("--memory", self.memory),
            ("--shm", self.shm),
        ):
            if size is not None and not re.fullmatch(r"[1-9]\d*([KMGTP]i?)?", size, re.ASCII):
                raise JobError(
                    f"{option} {size!r} is not an amount of memory: write 500Mi or 64Gi."
                )
        if not self.mount.is_absolute():
            raise JobError(f"--mount {self.mount} must be an absolute path in the container.")

    def job(self, arguments: argparse.Namespace, overrides: tuple[str, ...]) -> Job:
        """The job that the command line describes; it must write to the claim."""
        job = cluster.job_of(arguments, overrides)
        folder = PurePosixPath(str(cluster.directory(job)))
        if ".." in folder.parts or not folder.is_relative_to(self.mount):
            setting = cluster.setting_of_directory(job)
            raise JobError(
                f"{setting} is {folder}, outside --mount {self.mount}, and would be lost "
                f"with the pod: add {setting}={self.mount / folder.name}, or mount the claim there."
            )
        return job

    def command(self, job: Job) -> str:
        """The manifest for kubectl."""
        return yaml.dump_all(self._objects(job), Dumper=_Dumper, sort_keys=False, width=100)

    def run(self, job: Job) -> int:
        """Check the config and apply the manifest; return kubectl's exit code."""
        return cluster.submit(
            self.command(job),
            ["kubectl", "apply", "-f", "-"],
            job=job,
            allocation=self.allocation,
        )

    def check(self, job: Job) -> int:
        """Print the resolved config, if this machine can check it; return the exit code."""
        return cluster.check(job, self.allocation)

    def _objects(self, job: Job) -> Iterator[dict[str, Any]]:
        if self.claim_size is not None:
            spec = {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": self.claim_size}},
            }
            yield self._object("v1", "PersistentVolumeClaim", spec=spec, name=self.claim)
        data = {name: path.read_text(encoding="utf-8") for name, path in _files(job).items()}
        yield self._object("v1", "ConfigMap", data=data)
        if job.num_nodes > 1 and job.module != EXPORT:
            spec = {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,  # the pods meet before they are ready
                "selector": {"batch.kubernetes.io/job-name": self.allocation.name},
                "ports": [{"name": "rendezvous", "port": PORT}],
            }
            yield self._object("v1", "Service", spec=spec)
        yield self._object("batch/v1", "Job", spec=self._job_spec(job))

    def _object(
        self, version: str, kind: str, *, name: str | None = None, **rest: Any
    ) -> dict[str, Any]:
        metadata = {"name": name or self.allocation.name}
        metadata |= {"namespace": self.namespace} if self.namespace else {}
        return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}

    def _job_spec(self, job: Job) -> dict[str, Any]:
        allocation = self.allocation
        limit = {"activeDeadlineSeconds": allocation.seconds} if allocation.seconds else {}
        return {
            "completionMode": "Indexed",
            "completions": job.num_nodes,
            "parallelism": job.num_nodes,
            # When one pod fails, all fail, and each counts.
            "backoffLimit": allocation.max_restarts * job.num_nodes,
            "podReplacementPolicy": "Failed",  # start no pod beside one that is still ending
            **limit,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": _codes(2),
                    },  # wrong use: a retry cannot help
                    {
                        "action": "Ignore",
                        "onExitCodes": _codes(3),
                    },  # stopped because another pod was
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                ]
            },
            "template": {"spec": self._pod_spec(job)},
        }

    def _pod_spec(self, job: Job) -> dict[str, Any]:
        name = self.allocation.name
        several = job.num_nodes > 1 and job.module != EXPORT
        claim = {"name": "claim", "persistentVolumeClaim": {"claimName": self.claim}}
        shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shm}}
        return {
            "restartPolicy": "Never",
            "securityContext": {"fsGroup": USER},  # else a new claim belongs to root
            "terminationGracePeriodSeconds": self.allocation.grace_seconds,
            **({"subdomain": name} if several else {}),
            "containers": [self._container(job)],
            "volumes": [{"name": "config", "configMap": {"name": name}}, claim, shm],
        }

    def _container(self, job: Job) -> dict[str, Any]:
        is_export = job.module == EXPORT
        env = dict(cluster.environment(job))
        env.pop("PYTHONPATH", None)  # a path of this machine; the image has latentmill installed
        if not is_export:
            env |= {"RUN_DIR": str(cluster.directory(job))}
            if job.num_nodes > 1:
                name = self.allocation.name
                env |= {"MASTER_ADDR": f"{name}-0.{name}", "MASTER_PORT": str(PORT)}
        cpus = job.processes_per_node * self.allocation.cpus_per_process
        memory = {"memory": self.memory} if self.memory else {}
        gpus = {"nvidia.com/gpu": job.processes_per_node} if job.device == "gpu" else {}
        hook = {"preStop": {"exec": {"command": ["bash", "-c", STOP]}}}
        return {
            "name": "main",
            "image": self.image,
            "args": ["bash", "-c", _script(job)],  # the image's entry point prints versions first
            "env": [{"name": key, "value": value} for key, value in env.items()],
            "resources": {"requests": {"cpu": cpus, **memory}, "limits": {**gpus, **memory}},
            **({} if is_export else {"lifecycle": hook}),
            "volumeMounts": [
                {"name": "config", "mountPath": str(CONFIGS)},
                {"name": "claim", "mountPath": str(self.mount)},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        }


def _node(job: Job) -> Job:
    """The job of one pod: its part of a training, or a whole export."""
    if job.module != EXPORT:
        return job
    return replace(job, num_nodes=1, num_processes=job.processes_per_node)


def _files(job: Job) -> dict[str, Path]:
    """The files in CONFIGS, by name."""
    topology = local.topology(_node(job))
    deepspeed = local.deepspeed_file(topology)
    files = {"config.yaml": job.config, "topology.yaml": topology}
    return files if deepspeed is None else files | {"deepspeed.json": deepspeed}


def _codes(code: int) -> dict[str, Any]:
    return {"containerName": "main", "operator": "In", "values": [code]}


def _script(job: Job) -> str:
    """The script of a pod's container."""
    is_export, node = job.module == EXPORT, _node(job)
    deepspeed = CONFIGS / "deepspeed.json" if "deepspeed.json" in _files(job) else None
    options = cluster.launcher(node, CONFIGS / "topology.yaml", deepspeed)
    lines = ["python -m accelerate.commands.launch", shlex.join(options)]
    if node.num_nodes > 1:
        lines += ['--machine_rank "$JOB_COMPLETION_INDEX"']
        lines += ['--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"']
    config = CONFIGS / "config.yaml"
    run = shlex.join(["-m", job.module, str(config), *job.overrides, *job.options])
    lines += [run]
    command = " \\\n    ".join(lines)
    if is_export:
        # `pipeline.export` reads the variables of a Slurm array: the pods imitate one.
        array = {"ID": '"$JOB_COMPLETION_INDEX"', "MIN": 0, "COUNT": job.num_nodes}
        exports = [f"export SLURM_ARRAY_TASK_{name}={value}\n" for name, value in array.items()]
        return f"{''.join(exports)}exec {command}\n"
    parts = [BEFORE_TRAINING.strip("\n"), command, AFTER_TRAINING.lstrip("\n")]
    if job.module == TRAIN:  # a wrong config: exit code 2, before outcome.json exists
        parts.insert(0, f"WORLD_SIZE={job.num_processes} python {run} --dry-run >/dev/null || exit")
    return "\n".join(parts)
