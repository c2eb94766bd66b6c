"""What a site asks of the pods of a Job: Secrets, labels, nodes. One option for each.

options -> Site -> parts of the manifest; every other field is set by a patch file (k8s_patch.py)

Names and values are checked by Kubernetes, whose messages name the field and the rule.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cluster import Groups
from launch.job import JobError


@dataclass(frozen=True, kw_only=True)
class Site:
    """The options of a site."""

    labels: Mapping[str, str]  # of every object, and of the pods
    node_selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, str]]
    secrets: Sequence[str]  # all their keys become variables
    pull_secrets: Sequence[str]

    @staticmethod
    def add_arguments(groups: Groups) -> None:
        """Add the options to the groups of --help."""

        def add_list(group: str, option: str, metavar: str, text: str) -> None:
            text = f"{text}; repeatable"
            groups[group](option, action="append", default=[], metavar=metavar, help=text)

        text = "run on nodes with this label, e.g. gpu-type=h100"
        add_list("machines", "--node-selector", "KEY=VALUE", text)
        text = "accept nodes with this taint, e.g. nvidia.com/gpu:NoSchedule"
        add_list("machines", "--toleration", "KEY[=VALUE][:EFFECT]", text)
        text = "label of the Job and its pods, e.g. kueue.x-k8s.io/queue-name=research"
        add_list("job", "--label", "KEY=VALUE", text)
        text = "Secret of type docker-registry, for a private registry"
        add_list("container", "--image-pull-secret", "NAME", text)
        text = "Secret whose keys become environment variables, e.g. WANDB_API_KEY"
        add_list("environment", "--secret", "NAME", text)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Site":
        """The site that the command line describes; raises JobError for a label without a value."""
        return cls(
            labels=_labels("--label", arguments.label),
            node_selector=_labels("--node-selector", arguments.node_selector),
            tolerations=[_toleration(text) for text in arguments.toleration],
            secrets=arguments.secret,
            pull_secrets=arguments.image_pull_secret,
        )

    def metadata(self) -> dict[str, Any]:
        """Labels, if there are any."""
        return {"labels": dict(self.labels)} if self.labels else {}

    def pod(self) -> dict[str, Any]:
        """Fields of a pod's spec; those that nobody asked for are left out."""
        fields = {
            "imagePullSecrets": [{"name": name} for name in self.pull_secrets],
            "nodeSelector": dict(self.node_selector),
            "tolerations": list(self.tolerations),
        }
        return {name: value for name, value in fields.items() if value}

    def container(self) -> dict[str, Any]:
        """Fields of a container."""
        sources = [{"secretRef": {"name": name}} for name in self.secrets]
        return {"envFrom": sources} if sources else {}


def _labels(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Labels by name, from KEY=VALUE."""
    for text in texts:
        if "=" not in text:
            raise JobError(f"{option} {text!r} is not a label: write KEY=VALUE.")
    return dict(text.split("=", 1) for text in texts)


def _toleration(text: str) -> dict[str, str]:
    """The toleration of a taint; without EFFECT, of all effects."""
    taint, colon, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    matches = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **matches, **({"effect": effect} if colon else {})}
