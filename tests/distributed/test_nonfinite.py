"""A gradient or a sample that is not finite, on one rank of two: one decision, by all, counted.

A step is skipped if the norm of the reduced gradient is not finite: position and learning rate go
on, parameters, moments, average and the number of updates do not. A sample that is not finite is a
tombstone instead, and skips nothing.
"""

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from webdataset.writer import TarWriter

from pipeline.checkpoints.folder import read_state
from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.models.autoencoder import tensors_sha256
from tests.checkpoints.test_resume import outcome, write_config
from tests.distributed.in_turn import words
from tests.distributed.models import MODELS, is_determined
from tests.processes import ROOT, Processes, argv_of, env_of

pytestmark = pytest.mark.timeout(900)
WORKER = ROOT / "tests/distributed/in_turn.py"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
NUM_STEPS = 9
BATCH = 12
# Step, rank, where, factor: before the first update, twice in a row, in both groups of parameters
# (the last one is the learned sigma; ZeRO gives each to one rank alone), all over, and so large
# that only the norm overflows.
STRIKES = [
    [0, 1, 0, math.nan],
    [3, 1, -1, -math.inf],
    [4, 0, "output", math.inf],
    [6, 1, "output", 1e30],
]
STRUCK = [0, 3, 4, 6]
FILES = ("model", "ema", "optimizer")
# In test-all both accumulations, and the stages that shard gradients; the other pairs are soak.
WAYS = [("ddp", 2), ("zero2", 2), ("zero3", 1)]
OTHERS = [("ddp", 1), ("zero1", 1), ("zero1", 2), ("zero2", 1), ("zero3", 2)]


def marks_of(strategy: str, *, soak: bool = False) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.distributed if strategy == "ddp" else pytest.mark.deepspeed]
    return [*marks, pytest.mark.soak] if soak else marks


@dataclass(frozen=True)
class Seen:
    """What a run left: its records by step, its checkpoints, and the ranks' digests per step."""

    steps: dict[int, dict[str, float]]
    checkpoints: dict[int, Path]
    digests: list[list[str]]

    def column(self, name: str) -> np.ndarray:
        """A metric at every step."""
        return np.array([self.steps[step][name] for step in sorted(self.steps)])

    def tensors(self, step: int, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one checkpoint's file."""
        return load_file(self.checkpoints[step] / f"{name}.safetensors")


def records(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def started(
    tiny_shards: Path, arrays: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Do all that is asked of a strategy, in one start: each model with the strikes, saving after
    every step; then the run on arrays.
    """

    @cache
    def run(strategy: str, num_processes: int, accumulation: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{strategy}-{num_processes}-{accumulation}")
        jobs: list[list[object]] = []
        for model, settings in MODELS.items():
            (folder / model).mkdir()
            config = write_config(folder / model, tiny_shards, accumulation)
            job = ["strike", folder / model / "digests", json.dumps(STRIKES), config]
            saved = ("checkpoint.every_steps=1", "checkpoint.keep.latest=99")
            jobs.append([*job, f"num_steps={NUM_STEPS}", *saved, *settings])
        cut = f"accumulation={accumulation}"
        jobs.append(["train", arrays, f"run_dir={folder / 'arrays'}", cut])
        argv = [*argv_of(WORKER, num_processes, strategy), *words(*jobs)]
        ended = Processes(argv, folder / "log", env=env_of(strategy), cwd=ROOT, forked=True)
        result = ended.wait(600)
        assert result.code == 0, result.output
        return folder

    return run


@pytest.fixture(scope="module")
def struck(started: Callable[..., Path]) -> Callable[..., Seen]:
    """What a run with the strikes left."""

    def read(model: str, strategy: str, num_processes: int, accumulation: int) -> Seen:
        folder = started(strategy, num_processes, accumulation) / model
        found = {read_state(path).step: path for path in (folder / "run/checkpoints").iterdir()}
        paths = [folder / f"digests-{rank}.json" for rank in range(num_processes)]
        digests = [json.loads(path.read_bytes()) for path in paths]
        return Seen(records(folder / "run"), found, digests)

    return read


each_way = pytest.mark.parametrize(
    ("strategy", "accumulation"),
    [
        *(pytest.param(*way, marks=marks_of(way[0])) for way in WAYS),
        *(pytest.param(*way, marks=marks_of(way[0], soak=True)) for way in OTHERS),
    ],
)


@each_way
@pytest.mark.parametrize("model", MODELS)
def test_a_gradient_spoilt_on_one_rank_skips_the_step_on_all(
    struck: Callable[..., Seen], model: str, strategy: str, accumulation: int
):
    seen, one = struck(model, strategy, 2, accumulation), struck(model, "ddp", 1, 1)
    check_decisions(seen)
    check_decisions(one)
    assert (seen.digests[0] == seen.digests[1]) == (strategy != "zero3")  # whole, or a shard each
    # The same as one process that is struck in the same steps: its losses, norms and end.
    np.testing.assert_allclose(seen.column("train/loss"), one.column("train/loss"), rtol=1e-4)
    norms = seen.column("optim/grad_norm")
    np.testing.assert_allclose(norms, one.column("optim/grad_norm"), rtol=5e-4)
    for name in FILES:
        found, expected = seen.tensors(NUM_STEPS, name), one.tensors(NUM_STEPS, name)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            if is_determined(key):
                torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


def check_decisions(seen: Seen) -> None:
    """Raise unless exactly the struck steps moved nothing, on any rank."""
    is_applied = [step not in STRUCK for step in range(NUM_STEPS)]
    for digests in seen.digests:
        moved = [now != then for then, now in pairwise(digests)]
        assert moved == is_applied[:-1]
    num_skipped = np.cumsum(np.logical_not(is_applied))
    assert seen.column("optim/skipped_steps").tolist() == num_skipped.tolist()
    assert np.isfinite(seen.column("optim/grad_norm")).tolist() == is_applied
    assert np.isfinite(seen.column("train/loss")).all()
    former: dict[str, str] = {}
    for step, path in sorted(seen.checkpoints.items()):
        state = read_state(path)
        assert (state.step, state.position) == (step, step * BATCH)
        assert state.num_updates == step - num_skipped[step - 1]
        tensors = {name: seen.tensors(step, name) for name in FILES}
        assert all(value.isfinite().all() for part in tensors.values() for value in part.values())
        now = {name: tensors_sha256(part) for name, part in tensors.items()}
        for name in FILES if former else ():
            assert (now[name] != former[name]) == is_applied[step - 1], (step, name)
        former = now
    assert sorted(seen.checkpoints) == list(range(1, NUM_STEPS + 1))
    # Struck before its first update, the average is still that of the initial weights.
    assert tensors_sha256(seen.tensors(1, "ema")) == tensors_sha256(seen.tensors(1, "model"))
    assert not any(value.any() for value in seen.tensors(1, "optimizer").values())


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=marks_of(name, soak=name != "ddp")) for name in STRATEGIES],
)
def test_more_skipped_steps_than_allowed_end_the_run(
    tmp_path: Path, tiny_shards: Path, run_processes: Callable, strategy: str
):
    config, run = write_config(tmp_path, tiny_shards), tmp_path / "run"
    strikes = json.dumps(STRIKES)
    arguments = ("strike", tmp_path / "digests", strikes, config, "max_skipped_steps=2")
    ended = run_processes(WORKER, 2, *arguments, strategy=strategy)
    assert ended.code != 0
    message = "3 updates were skipped because their gradient was not finite: more than "
    message += "max_skipped_steps 2."
    assert message in ended.output
    assert message in outcome(run)["message"]
    assert (outcome(run)["status"], outcome(run)["exit_code"]) == ("failed", 1)
    assert max(records(run)) == 5  # the third, where it was seen
    state = read_state(run / "checkpoints" / "step-3")
    assert (state.num_updates, state.step) == (2, 3)


BAD = {5: math.nan, 17: math.inf, 18: -math.inf, 40: math.nan}
ARRAYS = """
run_dir: {tmp}/run
data:
  path: {tmp}/shards
  decode: {{kind: array, shape: [3, 4], range: [-2, 2]}}
  max_bad_fraction: 1.0
model: {{backbone: {{kind: mlp, hidden: [8]}}, bottleneck: {{kind: gaussian, size: 2}}}}
corruptions: [{{kind: gaussian_noise}}]
objective: {{regularisers: [{{kind: kl}}]}}
batch_size: 12
num_steps: 8
evaluation: {{every_steps: 4}}
monitor: {{log_every_steps: 1, num_images: 0, wandb: {{mode: disabled}}}}
"""


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config on 48 float arrays, of which four hold one value that is not finite."""
    folder = tmp_path_factory.mktemp("arrays")
    (folder / "shards").mkdir()
    for shard in range(4):
        with TarWriter(str(folder / "shards" / f"{shard}.tar"), encoder=False, mtime=0) as tar:
            for number in range(12 * shard, 12 * shard + 12):
                values = np.random.default_rng(number).uniform(-2, 2, (3, 4)).astype(np.float32)
                if number in BAD:
                    values[1, 2] = BAD[number]
                file = io.BytesIO()
                np.save(file, values)
                tar.write({"__key__": f"{number:04d}", "npy": file.getvalue()})
    build_index(folder / "shards", split=SplitSpec(fractions={"train": 0.75, "held_out": 0.25}))
    path = folder / "config.yaml"
    path.write_text(ARRAYS.format(tmp=folder))
    return path


@each_way
def test_a_sample_that_is_not_finite_is_a_tombstone_and_skips_nothing(
    started: Callable[..., Path], strategy: str, accumulation: int
):
    run = started(strategy, 2, accumulation) / "arrays"
    found, expected = records(run), records(started("ddp", 1, 1) / "arrays")
    assert found.keys() == expected.keys() == set(range(1, 9))
    for step, values in found.items():
        assert values["optim/skipped_steps"] == 0
        for name in ("data/tombstones", "data/order_digest"):
            assert values[name] == expected[step][name]
        for name in ("train/loss", "optim/grad_norm"):
            assert values[name] == pytest.approx(expected[step][name], rel=1e-3)
    assert found[8]["data/tombstones"] > 2  # some of them twice: the epoch has begun again
    entries = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {(entry["key"], entry["stage"]) for entry in entries} == {
        (f"{number:04d}", "range") for number in BAD
    }
