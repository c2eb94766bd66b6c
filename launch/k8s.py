"""A Job on Kubernetes: a manifest of core API objects, and its submission by `kubectl apply`.

    Job, Allocation -> ConfigMap   the config file and its topology
                       Service     headless: a name for every pod
                       Job         Indexed: one pod per machine, restarted together
                    (-> PersistentVolumeClaim)
    -> k8s_patch.py: the user's changes -> YAML

Before a pod is evicted or deleted, its preStop hook touches STOP in the run directory until the
trainer has saved and ended. The Job starts new pods, and the same command resumes.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from launch import cluster
from launch.cluster import Allocation
from launch.job import EXPORT, Job, JobError
from launch.k8s_patch import patched
from launch.k8s_script import CONFIGS, PORT, STOP, files, literal, script
from launch.k8s_site import Site

USER = 10001  # in the image, see docker/Dockerfile
SECRET_REMEDY = (
    "keep it in a Secret (`kubectl create secret generic NAME --from-literal {name}=...`), and "
    "give --secret NAME."
)


# Texts that PyYAML leaves without quotes, but that are numbers or truths to kubectl's parser.
NO_TEXT = re.compile(r"[-+]?[\d_]*\.?[\d_]*(e[-+]?\d+)?|[-+]?0[box][\da-f_]+|[yn]", re.IGNORECASE)


class _Dumper(yaml.SafeDumper):
    """Writes multi-line texts as YAML blocks, and all texts so that kubectl reads texts."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if NO_TEXT.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """A Kubernetes cluster."""

    allocation: Allocation
    site: Site
    image: str
    claim: str  # PersistentVolumeClaim of the run directory
    claim_size: str | None  # size of a claim to create; None = the claim exists
    mount: PurePosixPath  # path of the claim in the container
    memory: str | None
    shm: str
    namespace: str | None
    patches: tuple[Path, ...] = ()  # merged into the manifest, in turn

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of every cluster, and those of Kubernetes."""
        groups = cluster.add_arguments(parser, "container")
        add = groups["container"]
        add("--image", required=True, help="container image with latentmill, e.g. of docker/")
        text = "PersistentVolumeClaim that holds the run directory"
        add("--claim", required=True, metavar="NAME", help=text)
        add("--claim-size", metavar="SIZE", help="create the claim with this size, e.g. 100Gi")
        text = "path of the claim in the container (%(default)s)"
        add("--mount", type=PurePosixPath, default="/data", metavar="PATH", help=text)
        groups["machines"]("--memory", metavar="SIZE", help="memory of each pod, e.g. 64Gi")
        text = "limit of /dev/shm, part of the memory (%(default)s)"
        groups["machines"]("--shm", default="8Gi", metavar="SIZE", help=text)
        groups["job"]("--namespace", metavar="NAME", help="default: kubectl's current one")
        Site.add_arguments(groups)
        text = "YAML merged into the Job as `kubectl patch` does, for every other field; repeatable"
        groups["job"]("--patch", action="append", default=[], type=Path, metavar="FILE", help=text)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Kubernetes":
        """The place that the command line describes."""
        return cls(
            allocation=cluster.allocation_of(arguments),
            site=Site.from_arguments(arguments),
            image=arguments.image,
            claim=arguments.claim,
            claim_size=arguments.claim_size,
            mount=PurePosixPath(arguments.mount),
            memory=arguments.memory,
            shm=arguments.shm,
            namespace=arguments.namespace,
            patches=tuple(arguments.patch),
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
        job = cluster.job_of(arguments, overrides, SECRET_REMEDY)
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
        objects = list(self._objects(job))
        for path in self.patches:
            objects = patched(objects, path)
        return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=100)

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
        data = {name: path.read_text(encoding="utf-8") for name, path in files(job).items()}
        yield self._object("v1", "ConfigMap", data=data)
        if cluster.rendezvous_of(job).num_nodes > 1:
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
        metadata: dict[str, Any] = {"name": name or self.allocation.name}
        metadata |= {"namespace": self.namespace} if self.namespace else {}
        metadata |= self.site.metadata()
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
            "template": {
                **({"metadata": labels} if (labels := self.site.metadata()) else {}),
                "spec": self._pod_spec(job),
            },
        }

    def _pod_spec(self, job: Job) -> dict[str, Any]:
        name = self.allocation.name
        several = cluster.rendezvous_of(job).num_nodes > 1
        claim = {"name": "claim", "persistentVolumeClaim": {"claimName": self.claim}}
        shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shm}}
        return {
            "restartPolicy": "Never",
            "securityContext": {"fsGroup": USER},  # else a new claim belongs to root
            "terminationGracePeriodSeconds": self.allocation.grace_seconds,
            **({"subdomain": name} if several else {}),
            **self.site.pod(),
            "containers": [self._container(job)],
            "volumes": [{"name": "config", "configMap": {"name": name}}, claim, shm],
        }

    def _container(self, job: Job) -> dict[str, Any]:
        is_export = job.module == EXPORT
        env = cluster.environment(job, in_image=True)
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
            "args": ["bash", "-c", script(job)],  # the image's entry point prints versions first
            "env": [{"name": name, "value": literal(value)} for name, value in env.items()],
            **self.site.container(),
            "resources": {"requests": {"cpu": cpus, **memory}, "limits": {**gpus, **memory}},
            **({} if is_export else {"lifecycle": hook}),
            "volumeMounts": [
                {"name": "config", "mountPath": str(CONFIGS)},
                {"name": "claim", "mountPath": str(self.mount)},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        }


def _codes(code: int) -> dict[str, Any]:
    return {"containerName": "main", "operator": "In", "values": [code]}
