"""Will this training start, and stay up? A finding per check, all of them.

    config -> the parts that parse -> checks of the data (index, splits, members, shards, order)
                                   -> checks of the machine (device, memory, disk, clock, threads,
                                      strategy, W&B)
           -> if it is valid as a whole: what nobody means (`pipeline.training.sense`)

A finding is ok, a warning (it runs, but think of it) or a failure; each says what to do.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.commands.doctor.compute import check_device, check_threads
from pipeline.commands.doctor.data import check_index, check_order, check_sense, check_shards
from pipeline.commands.doctor.finding import Device, Finding, Findings, Parts, Patient
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

CHECKS: dict[str, Callable[[Patient], Findings]] = {
    "batch": check_batch,
    "index": check_index,
    "shards": check_shards,
    "order": check_order,
    "sense": check_sense,
    "device": check_device,
    "memory": check_memory,
    "disk": check_disk,
    "clock": check_clock,
    "threads": check_threads,
    "strategy": check_strategy,
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
) -> list[Finding]:
    """Check everything that can be checked; `topology`: the accelerate file of the launch.

    world: processes; None: one per GPU that is to compute, and 1 without any.
    """
    if world is None:
        world = max(1, torch.cuda.device_count()) if device != "cpu" else 1
    if world < 1:
        raise UserError(f"--processes {world}: a training has at least 1.")
    findings: list[Finding] = []
    whole, parts = _read(config, overrides, findings)
    if parts is None:
        return findings
    indexes = _open_indexes(parts, findings)
    order = _make_order(parts, indexes, findings)
    patient = Patient(parts, whole, indexes, order, world, topology, device)
    for name, check in CHECKS.items():
        try:
            findings += check(patient)
        except (UserError, OSError) as error:
            findings.append(Finding(name, "FAIL", str(error)))
    told: set[str] = set()  # two checks may meet the same mistake
    return [f for f in findings if not (f.text in told or told.add(f.text))]


def _read(
    path: Path, overrides: Sequence[str], findings: list[Finding]
) -> tuple[TrainConfig | None, Parts | None]:
    """The whole config if it is valid, and what of it can be used."""
    try:
        whole = read_config(path, overrides)
    except UserError as error:
        findings.append(Finding("config", "FAIL", str(error)))
    else:
        findings.append(Finding("config", "ok", f"{path} is valid"))
        return whole, Parts.model_validate_json(whole.model_dump_json())
    ours = [text for text in overrides if text.split("=")[0].split(".")[0] in Parts.model_fields]
    try:
        return None, strict.load(Parts, path, ours)
    except UserError:  # what is wrong is among the findings already
        return None, None


def _open_indexes(parts: Parts, findings: list[Finding]) -> list[tuple[DataSource, Index]]:
    opened: list[tuple[DataSource, Index]] = []
    for number, source in enumerate(parts.data.sources):
        try:
            opened.append((source, Index.open(source.path, number, parts.data.remote)))
        except UserError as error:
            findings.append(Finding("index", "FAIL", str(error)))
    return opened


def _make_order(
    parts: Parts, indexes: Sequence[tuple[DataSource, Index]], findings: list[Finding]
) -> Mixture | None:
    if len(indexes) < len(parts.data.sources):
        return None
    try:
        return order_of(parts.data, [index for _, index in indexes], 0, parts.batch_size)
    except UserError as error:
        findings.append(Finding("order", "FAIL", str(error)))
        return None
