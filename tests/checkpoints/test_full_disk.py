"""Checkpoints on a disk that is really full: a small tmpfs, mounted for the test."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.folder import RunState, save_checkpoint, verify_checkpoint
from pipeline.distributed.strategies.base import FullState

pytestmark = pytest.mark.fault
STATE = RunState(10, 120, 10, "order", "data", world=1, versions={})
MODEL, EMA, FIRST, SECOND = ({"weight": torch.full((3000,), n)} for n in (1.0, 2.0, 3.0, 4.0))
TENSORS = FullState(MODEL, EMA, FIRST, SECOND, num_updates=10)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def trained(run_dir: Path) -> list[dict]:
    """The records of the training."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "train/loss" in record]


@pytest.mark.parametrize("limit", ["bytes", "inodes"])
def test_a_disk_that_fills_up_at_any_write_leaves_no_litter(small_disk: Callable, limit: str):
    """The free space grows page by page (or file by file) until the checkpoint fits."""
    disk = small_disk("1m", "nr_inodes=200")
    older = save_checkpoint(disk, STATE, TENSORS)
    failures = 0
    for room in range(200):
        hogs = disk / "hogs"
        hogs.mkdir()
        if limit == "bytes":
            free = shutil.disk_usage(disk).free
            (hogs / "hog").write_bytes(bytes(free - 4096 * room))
        else:
            for number in range(os.statvfs(disk).f_ffree - room):
                (hogs / str(number)).touch()
        try:
            save_checkpoint(disk, replace(STATE, step=20), TENSORS)
            break
        except OSError:
            failures += 1
        finally:
            shutil.rmtree(hogs)
        assert names(disk) == {"step-10"}
        verify_checkpoint(older)
    assert failures >= 5  # one at least for each file
    verify_checkpoint(disk / "step-20")


def test_a_full_disk_costs_checkpoints_and_never_the_run(
    small_disk: Callable, tmp_path: Path, tiny_shards: Path, start_processes: Callable
):
    """One checkpoint of 7.5 MB fits. Without room for the last one, the run has failed.

    Resumed, it goes on from that one, and is done once there is room again.
    """
    disk = small_disk("12m")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(disk)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: {run_dir}\n"
        f"data: {{path: {tiny_shards}, decode: {{kind: image, size: 32, channels: 3}}}}\n"
        "batch_size: 12\n"
        "checkpoint: {every_steps: 5}\n"
        "monitor: {log_every_steps: 1, num_images: 0, wandb: {mode: disabled}}\n"
    )
    failed = start_processes("pipeline.train", None, config, "num_steps=20").wait()
    assert failed.code == 1, failed.output
    assert failed.output.count("could not be saved (") == 3
    assert "failed at step 20: the last checkpoint could not be saved" in failed.output
    assert "Traceback" not in failed.output
    assert json.loads((run_dir / "outcome.json").read_bytes())["exit_code"] == 1
    assert names(disk) == {"step-5"}
    verify_checkpoint(disk / "step-5")
    failures = [record["checkpoint/failures"] for record in trained(run_dir)]
    assert failures == sorted(failures)
    assert failures[-1] == 2  # the last one fails after the last log

    resumed = start_processes("pipeline.train", None, config, "num_steps=60")
    resumed.wait_for("could not be saved")
    small_disk("64m")
    done = resumed.wait()
    assert done.code == 0, done.output
    assert names(disk) == {"step-55", "step-60"}
    verify_checkpoint(disk / "step-60")
    assert [record["step"] for record in trained(run_dir)] == list(range(1, 61))
