"""A finding of doctor, and what its checks are given."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from pipeline.common.component import Component
from pipeline.config import EvaluationConfig, TrainConfig
from pipeline.data.index import Index
from pipeline.data.order.mixture import Mixture
from pipeline.data.settings import DataConfig, DataSource
from pipeline.data.storage import RemotePolicy

NUM_SHOWN = 3
ATTEMPTS = 2
COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "FAIL": "\x1b[31m"}
NO_COLOUR = "\x1b[0m"

Verdict = Literal["ok", "warning", "FAIL"]
Device = Literal["cpu", "gpu", "auto"]


@dataclass(frozen=True)
class Finding:
    """What one check found; a warning or failure names the remedy."""

    check: str
    verdict: Verdict
    text: str

    def line(self, in_colour: bool) -> str:
        """One line for a terminal or a file."""
        verdict = f"{'WARN' if self.verdict == 'warning' else self.verdict:<9}"
        if in_colour:
            verdict = f"{COLOURS[self.verdict]}{verdict}{NO_COLOUR}"
        return f"{verdict}{self.check:<10}{' '.join(self.text.split())}"


Findings = Iterator[Finding]


class CheckedSettings(Component):
    """The settings that most checks need; valid even where the rest of the config is not."""

    model_config = ConfigDict(extra="ignore")

    run_dir: str = "."
    data: DataConfig
    batch_size: int = TrainConfig.model_fields["batch_size"].default
    accumulation: int = 1
    evaluation: EvaluationConfig = EvaluationConfig()


@dataclass(frozen=True)
class DoctorContext:
    """A training that is to be checked.

    config: None if it is not valid as a whole. indexes: of the data sets that have one. order: None
    if it cannot be planned.
    """

    settings: CheckedSettings
    config: TrainConfig | None
    indexes: list[tuple[DataSource, Index]]
    order: Mixture | None
    world: int
    topology: Path | None
    device: Device  # on which it is to compute
    card_gb: float | None  # its memory in 10^9 bytes, if it is a GPU elsewhere

    @property
    def remote(self) -> RemotePolicy:
        """The config's policy with fewer attempts, to report an unreachable store soon."""
        return self.settings.data.remote.model_copy(update={"attempts": ATTEMPTS})


def some(names: Sequence[str]) -> str:
    """The first few names, how many more there are, and the verb."""
    shown = ", ".join(names[:NUM_SHOWN])
    more = f" and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"
