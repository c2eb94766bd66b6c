"""Will this training start and keep running? Every check runs and reports its findings.

    config -> the valid settings -> checks of the data (index, splits, members, shards, order)
                                 -> checks of the machine (device, memory, disk, clock, threads,
                                    strategy, a step's memory, W&B)
           -> if all of it is valid: likely mistakes (`pipeline.training.sense`)

A finding is ok, a warning (the training runs, but perhaps not as meant) or a failure.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.commands.doctor.compute import check_device, check_step, check_threads
from pipeline.commands.doctor.data import check_index, check_order, check_sense, check_shards
from pipeline.commands.doctor.evaluation import check_evaluation
from pipeline.commands.doctor.finding import (
    CheckedSettings,
    Device,
    DoctorContext,
    Finding,
    Findings,
)
from pipeline.commands.doctor.machine import (
    check_batch,
    check_clock,
    check_disk,
    check_memory,
    check_names,
    check_strategy,
    check_wandb,
)
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig, read_config
from pipeline.data.index import Index
from pipeline.data.order.mixture import Mixture
from pipeline.data.settings import DataSource
from pipeline.data.stream.datasets import order_of
from pipeline.training.locations import open_source

CHECKS: dict[str, Callable[[DoctorContext], Findings]] = {
    "batch": check_batch,
    "index": check_index,
    "shards": check_shards,
    "order": check_order,
    "evaluated": check_evaluation,
    "sense": check_sense,
    "device": check_device,
    "memory": check_memory,
    "disk": check_disk,
    "clock": check_clock,
    "threads": check_threads,
    "strategy": check_strategy,
    "step": check_step,
    "wandb": check_wandb,
    "names": check_names,
}


def diagnose(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    world: int | None = None,
    device: Device = "auto",
    topology: Path | None = None,
    card_gb: float | None = None,
) -> list[Finding]:
    """Run all checks and return their findings; `topology`: accelerate's file.

    world: processes; None: one per GPU, or 1 without any. card_gb: memory of the GPU that is to
    compute; None: what this machine has.
    """
    if world is None:
        world = max(1, torch.cuda.device_count()) if device != "cpu" else 1
    if world < 1:
        raise UserError(f"--processes must be at least 1, not {world}.")
    findings: list[Finding] = []
    whole, settings = _read(config, overrides, findings)
    if settings is None:
        return findings
    indexes = _open_indexes(settings, findings)
    order = _make_order(settings, indexes, findings)
    context = DoctorContext(settings, whole, indexes, order, world, topology, device, card_gb)
    for name, check in CHECKS.items():
        try:
            findings += check(context)
        except (UserError, OSError) as error:
            findings.append(Finding(name, "FAIL", str(error)))
    shown: set[str] = set()  # two checks may find the same mistake
    return [f for f in findings if not (f.text in shown or shown.add(f.text))]


def _read(
    path: Path, overrides: Sequence[str], findings: list[Finding]
) -> tuple[TrainConfig | None, CheckedSettings | None]:
    """The config if it is valid, and the settings that most checks need if these are."""
    try:
        whole = read_config(path, overrides)
    except UserError as error:
        findings.append(Finding("config", "FAIL", str(error)))
    else:
        findings.append(Finding("config", "ok", f"{path} is valid"))
        return whole, CheckedSettings.model_validate_json(whole.model_dump_json())
    known = CheckedSettings.model_fields
    ours = [text for text in overrides if text.split("=")[0].split(".")[0] in known]
    try:
        return None, strict.load(CheckedSettings, path, ours)
    except UserError:  # already among the findings
        return None, None


def _open_indexes(
    settings: CheckedSettings, findings: list[Finding]
) -> list[tuple[DataSource, Index]]:
    opened: list[tuple[DataSource, Index]] = []

    def say(line: str) -> None:
        findings.append(Finding("index", "ok", line))

    for number in range(len(settings.data.sources)):
        try:
            opened.append(open_source(Path(settings.run_dir), settings.data, number, say))
        except UserError as error:
            findings.append(Finding("index", "FAIL", str(error)))
    return opened


def _make_order(
    settings: CheckedSettings, indexes: Sequence[tuple[DataSource, Index]], findings: list[Finding]
) -> Mixture | None:
    if len(indexes) < len(settings.data.sources):
        return None
    try:
        return order_of(settings.data, [index for _, index in indexes], 0, settings.batch_size)
    except UserError as error:
        findings.append(Finding("order", "FAIL", str(error)))
        return None
