"""A Job: module, config, overrides, number of processes and device, wherever it runs.

    command line -> Job -> local.py: argv and environment of `accelerate launch`
                        -> slurm.py: the text of an sbatch script
                        -> k8s.py: a manifest of Kubernetes

Of `pipeline` this package imports only `common`: it knows a run by its command line, its `run_dir`,
and the outcome.json in it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from pipeline.common.errors import UserError
from pipeline.common.files import local_directory
from pipeline.common.trial import PLACEHOLDER, VARIABLE, with_trial

TRAIN = "pipeline.train"
EXPORT = "pipeline.export"

Device = Literal["cpu", "gpu"]
Strategy = Literal["ddp", "zero1", "zero2", "zero3"]


class JobError(UserError):
    """A job that cannot be started as described."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a module of the pipeline on a number of processes."""

    module: str = TRAIN
    config: Path
    overrides: tuple[str, ...] = ()  # a.b=c, passed through untouched
    options: tuple[str, ...] = ()  # of the module itself, after the overrides
    num_processes: int = 1  # over all machines
    num_nodes: int = 1  # machines, with equally many processes
    device: Device = "cpu"
    strategy: Strategy | None = None  # chooses the topology; None = ddp, or that of `topology`
    topology: Path | None = None  # accelerate's YAML; None = the shipped one that fits
    num_threads: int = 1  # OMP_NUM_THREADS of each process
    env: Mapping[str, str] = field(default_factory=dict[str, str])  # on top of everything else

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise JobError(f"--processes must be at least 1, not {self.num_processes}.")
        if self.num_nodes < 1:
            raise JobError(f"--nodes must be at least 1, not {self.num_nodes}.")
        if self.num_processes % self.num_nodes:
            raise JobError(
                f"{self.num_processes} processes do not divide evenly over --nodes "
                f"{self.num_nodes}: every machine runs the same number."
            )
        if self.num_threads < 1:
            raise JobError(f"--threads must be at least 1, not {self.num_threads}.")
        for path in (self.config, self.topology):
            if path is not None and not path.is_file():
                raise JobError(f"The file {path} does not exist.")
        if self.topology is not None and self.strategy is not None:
            raise JobError(
                f"--topology {self.topology} decides the strategy itself: leave out either "
                f"--strategy {self.strategy} or --topology."
            )

    @property
    def processes_per_node(self) -> int:
        """The number of processes on each machine."""
        return self.num_processes // self.num_nodes

    @property
    def arguments(self) -> list[str]:
        """The arguments of the module."""
        return [str(self.config), *self.overrides, *self.options]

    def run_dir(self) -> Path | None:
        """The directory of the run, where outcome.json appears.

        None if the config names none: then only the launcher's own exit code is known.
        """
        return self.path("run_dir")

    def path(self, setting: str) -> Path | None:
        """The directory in a top-level setting, None if that is missing; UserError for a URL."""
        value = self.value(setting)
        if value is None:
            return None
        try:
            value = with_trial(value) if setting == "run_dir" else value
        except ValueError as error:
            raise JobError(f"{setting}: {error}.") from None
        return local_directory(value, setting)

    def trial(self) -> dict[str, str]:
        """The variable that `{trial}` in run_dir stands for, for processes elsewhere."""
        is_trial = PLACEHOLDER in (self.value("run_dir") or "") and self.run_dir() is not None
        return {VARIABLE: os.environ[VARIABLE]} if is_trial else {}

    def value(self, setting: str) -> str | None:
        """The text of a top-level setting: of the last override, else of the config."""
        value = mapping(self.config.read_text(encoding="utf-8")).get(setting)
        for override in self.overrides:
            name, _, text = override.removeprefix("--").partition("=")
            if name == setting:
                value = text
        return value if isinstance(value, str) else None


def mapping(text: str) -> dict[str, Any]:
    """The YAML mapping in `text`; empty for anything else: the run itself reports that."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
