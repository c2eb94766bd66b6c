"""A run that goes on with other numbers of processes, and other strategies, is the same run.

2 -> 1 -> 3 -> 2 processes, ten steps each: the samples of every step exactly, each epoch whole;
the losses of every ten steps as two processes of DDP have them from the same checkpoint
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pipeline.checkpoints.folder import read_state
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.monitoring.ledger import DIGEST_BITS, planned_digest
from pipeline.training.build import make_order
from tests.launch.runs import outcome, write_config
from tests.processes import ROOT

WORKER = ROOT / "tests/distributed/equivalence_worker.py"
WINDOW_STEPS = 10  # as in the worker
LEGS = {
    "sizes": [("ddp", 2), ("ddp", 1), ("ddp", 3), ("ddp", 2)],
    "strategies": [("zero3", 2), ("ddp", 1), ("zero2", 3), ("zero1", 2)],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "legs",
    [
        pytest.param("sizes", marks=[pytest.mark.distributed, pytest.mark.soak]),
        pytest.param("strategies", marks=pytest.mark.deepspeed),
    ],
)
def test_processes_and_strategy_may_change_at_every_start(
    tmp_path: Path, tiny_shards: Path, run_processes: Callable, legs: str
):
    num_steps = WINDOW_STEPS * len(LEGS[legs])
    # The learning rate does not depend on num_steps, which each leg sets to where it ends.
    config, run, windows = (
        write_config(tmp_path, tiny_shards, num_steps),
        tmp_path / "run",
        "starts",
    )
    for number, (strategy, num_processes) in enumerate(LEGS[legs], start=1):
        step = WINDOW_STEPS * number
        arguments = (config, f"num_steps={step}")
        ended = run_processes("pipeline.train", num_processes, *arguments, strategy=strategy)
        assert ended.code == 0, ended.output
        assert outcome(run) == {"status": "done", "exit_code": 0, "step": step, "message": ""}
        assert read_state(run / "checkpoints" / f"step-{step}").world == num_processes
        shutil.copytree(run / "checkpoints" / f"step-{step}", tmp_path / windows / f"step-{step}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in steps] == list(range(1, num_steps + 1))
    check_samples(steps, strict.load(TrainConfig, config, []))

    # Two processes of DDP; every ten steps they take over the checkpoint of the run.
    found = tmp_path / "found.npz"
    ended = run_processes(WORKER, 2, found, tmp_path / windows, config)
    assert ended.code == 0, ended.output
    with np.load(found) as arrays:
        expected, parameters, world = arrays["losses"], arrays["parameters"], int(arrays["world"])
    assert world == 2
    losses = np.array([record["train/loss"] for record in steps])
    difference = np.abs(losses / expected - 1)
    print(f"losses differ by {difference.reshape(-1, WINDOW_STEPS).max(axis=1)} per leg")
    assert difference.max() < 1e-4
    start, end = (weights(tmp_path / windows / f"step-{n}") for n in (step - WINDOW_STEPS, step))
    distance = np.linalg.norm(parameters - end) / np.linalg.norm(end - start)
    print(f"weights differ by {distance:.1e} of the way of the last leg")
    assert distance < 1e-3
    assert losses[-5:].mean() < losses[:5].mean() - 1  # it learns: equality says something


def weights(checkpoint: Path) -> np.ndarray:
    """All parameters as one vector, in the worker's order."""
    found = sorted(load_file(checkpoint / "model.safetensors").items())
    return np.concatenate([value.flatten().numpy() for _, value in found])


def check_samples(steps: list[dict[str, float]], config: TrainConfig) -> None:
    """Raise unless every step took its samples, in their slots, and each epoch was whole."""
    index = Index.open(config.data.path)
    order = make_order(config, [index])
    planned = [planned_digest(order, [index], config.data.split, s) for s in range(len(steps))]
    assert [r["data/order_digest"] for r in steps] == [d % 2**DIGEST_BITS for d in planned]
    assert len(set(planned)) == len(planned)

    num, (alone,) = order.num_samples, order.orders
    num_epochs = len(steps) * config.batch_size // num
    assert num_epochs > len(LEGS)
    for epoch in range(num_epochs):
        shard, row = alone.samples(np.arange(epoch * num, (epoch + 1) * num))
        assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == num
    books = [record for record in steps if "data/ledger/epoch" in record]
    assert [book["data/ledger/epoch"] for book in books] == list(range(num_epochs))
    for book in books:
        assert book["data/ledger/usable"] + book["data/ledger/carried"] == num
    assert any(book["data/ledger/carried"] > 0 for book in books)  # a start in mid-epoch
