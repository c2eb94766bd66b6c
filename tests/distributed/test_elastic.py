"""A run that goes on with other numbers of processes, and other strategies, is the same run.

2 -> 1 -> 3 -> 2 processes, some steps each: the samples of every step exactly, each epoch whole;
the losses of every leg as two processes of DDP have them from the same checkpoint
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
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
from tests.distributed.in_turn import words
from tests.distributed.models import MODELS, WINDOW_STEPS, is_determined
from tests.launch.runs import outcome, write_config
from tests.processes import ROOT, Processes, argv_of, env_of

WORKER = ROOT / "tests/distributed/in_turn.py"
LEGS = {
    "sizes": [("ddp", 2), ("ddp", 1), ("ddp", 3), ("ddp", 2)],
    "strategies": [("zero3", 2), ("ddp", 1), ("zero2", 3), ("zero1", 2)],
}


Elastic = Callable[[str], Path]


@pytest.fixture(scope="module")
def elastic(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Elastic:
    """Train all models in turn over some legs; `MODEL/` has the run and the start of each leg."""

    def start(world: int, strategy: str, log: Path, *jobs: list[object]) -> None:
        argv = [*argv_of(WORKER, world, strategy), *words(*jobs)]
        ended = Processes(argv, log, env=env_of(strategy), cwd=ROOT, forked=True).wait(600)
        assert ended.code == 0, ended.output

    @cache
    def run(legs: str) -> Path:
        root = tmp_path_factory.mktemp(legs)
        configs: dict[str, Path] = {}
        for model in MODELS:
            (root / model).mkdir()
            # No step depends on num_steps, which each leg sets to where it ends.
            num_steps = WINDOW_STEPS[model] * len(LEGS[legs])
            configs[model] = write_config(root / model, tiny_shards, num_steps)
            # With other seeds a unit of ReLU flips by rounding: LOG.md.
            with configs[model].open("a") as file:
                file.write("seed: 2\n")
        for number, (strategy, world) in enumerate(LEGS[legs], start=1):
            jobs = [
                ["train", configs[m], f"num_steps={WINDOW_STEPS[m] * number}", *MODELS[m]]
                for m in MODELS
            ]
            start(world, strategy, root / "log", *jobs)
            for model in MODELS:
                step = WINDOW_STEPS[model] * number
                run = root / model / "run"
                done = {"status": "done", "exit_code": 0, "step": step, "message": ""}
                assert outcome(run) == done
                checkpoint = run / "checkpoints" / f"step-{step}"
                assert read_state(checkpoint).world == world
                shutil.copytree(checkpoint, root / model / "starts" / checkpoint.name)
        # Two processes of DDP; every ten steps they take over the checkpoint of the run.
        folders = [(root / model, configs[model], MODELS[model]) for model in MODELS]
        jobs = [
            ["record", f / "found.npz", f / "starts", c, *settings] for f, c, settings in folders
        ]
        start(2, "ddp", root / "log", *jobs)
        return root

    return run


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "legs",
    [
        pytest.param("sizes", marks=[pytest.mark.distributed, pytest.mark.soak]),
        pytest.param("strategies", marks=pytest.mark.deepspeed),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_processes_and_strategy_may_change_at_every_start(elastic: Elastic, legs: str, model: str):
    folder = elastic(legs) / model
    leg = WINDOW_STEPS[model]
    num_steps = leg * len(LEGS[legs])
    records = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    steps = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in steps] == list(range(1, num_steps + 1))
    check_samples(steps, strict.load(TrainConfig, folder / "config.yaml", []))

    with np.load(folder / "found.npz") as arrays:
        expected, parameters, world = arrays["losses"], arrays["parameters"], int(arrays["world"])
    assert world == 2
    losses = np.array([record["train/loss"] for record in steps])
    difference = np.abs(losses / expected - 1)
    print(f"losses differ by {difference.reshape(-1, leg).max(axis=1)} per leg")
    assert difference.max() < 1e-4
    last = (num_steps - leg, num_steps)
    start, end = (weights(folder / "starts" / f"step-{step}") for step in last)
    distance = np.linalg.norm(parameters - end) / np.linalg.norm(end - start)
    print(f"weights differ by {distance:.1e} of the way of the last leg")
    assert distance < 1e-3
    assert losses[-5:].mean() < losses[:5].mean() - 1  # it learns: equality says something


def weights(checkpoint: Path) -> np.ndarray:
    """The parameters as one vector, as the worker gives them."""
    found = sorted(load_file(checkpoint / "model.safetensors").items())
    return np.concatenate([value.flatten().numpy() for name, value in found if is_determined(name)])


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
