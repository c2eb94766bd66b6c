"""The same training on one and on two processes, in one micro-batch or two; one evaluation, too.

Floats add up in another order when a batch is cut, and training amplifies it: float64 is compared
to 1e-9 throughout; float32, under every strategy, in `test_zero`.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from webdataset.writer import TarWriter

from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.evaluation.trained import evaluate_run
from pipeline.train import main
from tests.distributed.equivalence_worker import record
from tests.distributed.in_turn import words
from tests.distributed.models import MODELS
from tests.processes import ROOT, Processes, argv_of
from tests.shards import png, tiny_image

pytestmark = pytest.mark.timeout(900)
WORKER = ROOT / "tests/distributed/in_turn.py"
BROKEN = (5, 21, 38)  # samples whose picture does not decode
CONFIG = """
run_dir: {tmp}/run
data:
  path: {tmp}/shards
  decode: {{kind: image, size: 32, channels: 3}}
  max_bad_fraction: 1.0
model:
  bottleneck: {{kind: gaussian, size: 4}}
  likelihood: {{kind: gaussian, sigma: learned}}
corruptions:
  - {{kind: gaussian_noise, sigma: [0.05, 0.2]}}
  - {{kind: masking, fraction: 0.2}}
objective:
  emphasis: {{corrupted: 1.0, untouched: 0.5}}
  regularisers:
    - {{kind: kl, weight: {{kind: linear, start: 0.5, end: 2.0, over_samples: 400}}}}
optimizer: {{max_grad_norm: 100.0, learning_rate: {{peak: 0.005, warmup_samples: 64}}}}
batch_size: 8
num_steps: 50
evaluation: {{every_steps: 2}}
monitor: {{log_every_steps: 1, num_images: 2, wandb: {{mode: disabled}}}}
"""

THREE_STEPS = ("num_steps=3", "precision=fp64", "optimizer.learning_rate.warmup_samples=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with everything that draws, weighs or is learned, on data with broken samples."""
    folder = tmp_path_factory.mktemp("equivalence")
    (folder / "shards").mkdir()
    for shard in range(3):
        with TarWriter(str(folder / "shards" / f"{shard}.tar"), mtime=0) as tar:
            for number in range(20 * shard, 20 * shard + 20):
                picture = b"no picture" if number in BROKEN else png(tiny_image(number))
                tar.write({"__key__": f"{number:04d}", "png": picture})
    build_index(folder / "shards", split=SplitSpec(fractions={"train": 0.7, "held_out": 0.3}))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(tmp=folder))
    return path


def here(config: Path, *overrides: str, windows: Path | None = None) -> dict[str, Any]:
    """Record a run in this very process."""
    return record(strict.load(TrainConfig, config, overrides), windows)


# Steps in float64 by model, with one micro-batch and two.
NUM_STEPS = {"burgess": (50, 20), "resnet-mini": (10, 10)}
each_model = pytest.mark.parametrize("model", MODELS)


def settings_of(model: str, accumulation: int = 1) -> tuple[str, ...]:
    num_steps = NUM_STEPS[model][accumulation - 1]
    # No step depends on num_steps.
    rate = "optimizer.learning_rate.final=0.005"
    cut = (f"accumulation={accumulation}", f"num_steps={num_steps}")
    return ("precision=fp64", rate, *cut, *MODELS[model])


@pytest.fixture(scope="module")
def fp64(config: Path) -> Callable[[str], dict[str, Any]]:
    """One process in float64, by model."""
    return cache(lambda model: here(config, *settings_of(model)))


@pytest.fixture(scope="module")
def two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Two processes in float64, by model and accumulation; they also train the run `two`."""

    @cache
    def start() -> Path:
        folder = tmp_path_factory.mktemp("two")
        jobs = [
            ["record", folder / f"{model}-{parts}.npz", "-", config, *settings_of(model, parts)]
            for model in MODELS
            for parts in (1, 2)
        ]
        jobs.append(["train", config, f"run_dir={config.with_name('two')}", *THREE_STEPS])
        argv = [*argv_of(WORKER, 2), *words(*jobs)]
        ended = Processes(argv, folder / "log", env={}, cwd=ROOT, forked=True).wait(600)
        assert ended.code == 0, ended.output
        return folder

    def run(model: str, accumulation: int) -> dict[str, Any]:
        with np.load(start() / f"{model}-{accumulation}.npz") as found:
            arrays = dict(found)
        assert arrays["world"] == 2
        return arrays

    return run


class Difference(NamedTuple):
    """Between two recorded runs: the largest of any step, relative to the second run."""

    losses: float
    gradients: float  # of the networks, as one vector, in norm
    norms: float  # of the norms that the runs themselves reported


def difference(left: dict[str, Any], right: dict[str, Any]) -> Difference:
    """Compare two runs step by step."""
    # Without the learned sigma, the last: its gradient, many times larger than all others together,
    # would hide them; the norms show it.
    networks = [run["gradients"][:, :-1] for run in (left, right)]
    distance = np.linalg.norm(networks[0] - networks[1], axis=1)
    gradients = distance / np.linalg.norm(networks[1], axis=1)
    losses, norms = (np.abs(left[name] / right[name] - 1) for name in ("losses", "norms"))
    return Difference(losses.max(), gradients.max(), norms.max())


@pytest.mark.distributed
def test_the_run_that_is_compared_learns_and_meets_broken_samples(fp64):
    found = fp64("burgess")
    assert found["losses"][-10:].mean() < found["losses"][:10].mean() - 100
    assert set(np.unique(found["weights"])) >= {7.0, 8.0}
    assert (np.linalg.norm(found["gradients"], axis=1) > 0).all()


def test_two_micro_batches_equal_one_in_float64(config: Path):
    one = here(config, "precision=fp64", "num_steps=10")
    two = here(config, "precision=fp64", "num_steps=10", "accumulation=2")
    assert max(difference(two, one)) < 1e-9
    np.testing.assert_allclose(two["parameters"], one["parameters"], rtol=1e-7, atol=1e-9)


@pytest.mark.distributed
@each_model
def test_two_processes_equal_one_in_float64(two, fp64, model: str):
    found, expected = two(model, 1), fp64(model)
    print(f"{model}, float64, two processes: {difference(found, expected)}")
    assert max(difference(found, expected)) < 1e-9
    np.testing.assert_allclose(found["parameters"], expected["parameters"], rtol=1e-7, atol=1e-9)
    # The broken samples fell on one process at a time, and counted for the whole batch.
    assert (found["weights"].sum(axis=1) == expected["weights"][:, 0]).all()
    assert (found["weights"][:, 0] != found["weights"][:, 1]).any()


@pytest.mark.distributed
@each_model
def test_two_processes_with_two_micro_batches_each_equal_one_in_float64(two, fp64, model: str):
    cut, expected = two(model, 2), fp64(model)
    columns = ("losses", "gradients", "norms")
    found = difference(cut, {name: expected[name][: len(cut[name])] for name in columns})
    print(f"{model}, float64, two processes, accumulation 2: {found}")
    assert max(found) < 1e-9


def test_bf16_computes_its_losses_in_float32_and_near_those_of_fp32(config: Path):
    fp32 = here(config, "num_steps=10")
    bf16 = here(config, "num_steps=10", "precision=bf16")
    assert bf16["dtypes"].tolist() == ["torch.float32"]
    assert bf16["gradients"].dtype == np.float32
    assert np.isfinite(bf16["losses"]).all()
    assert 0 < difference(bf16, fp32).losses < 0.02


def logged(run_dir: Path, *names: str) -> list[list[float]]:
    """These values at every step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[r[name] for name in names] for r in records if names[0] in r]


def evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """What a run logged under eval/ and eval_ema/, by step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found: dict[int, dict[str, float]] = {}
    for values in records:
        names = [name for name in values if name.startswith("eval")]
        found.setdefault(values["step"], {}).update({name: values[name] for name in names})
    return {step: values for step, values in found.items() if values}


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    run_dir = config.with_name("one")
    assert main([str(config), f"run_dir={run_dir}", *THREE_STEPS]) == 0
    return run_dir


UPDATES = ("optim/grad_norm", "train/loss", "train/kl", "train/squared_error")


def test_pipeline_train_takes_the_same_steps_in_two_micro_batches(config: Path, trained: Path):
    run_dir = config.with_name("micro")
    assert main([str(config), f"run_dir={run_dir}", "accumulation=2", *THREE_STEPS]) == 0
    found, expected = logged(run_dir, *UPDATES), logged(trained, *UPDATES)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert logged(trained, "data/tombstones")[-1] > [0]  # a wrong divisor would show


def num_held_out(config: Path) -> int:
    """Held-out samples whose picture decodes, counted by the rule of the split."""
    rule = SplitSpec(fractions={"train": 0.7, "held_out": 0.3})
    held_out = [n for n in range(60) if rule.names[rule.number_of(f"{n:04d}")] == "held_out"]
    return len(set(held_out) - set(BROKEN))


def test_an_evaluation_counts_every_good_held_out_sample_once(config: Path, trained: Path):
    found = evaluations(trained)
    assert sorted(found) == [0, 2, 3]
    assert num_held_out(config) % 8 != 0  # the last batch is filled up by repeats
    for values in found.values():
        assert values["eval/samples"] == values["eval_ema/samples"] == num_held_out(config)
        assert all(math.isfinite(value) for value in values.values())


def test_evaluating_a_finished_run_gives_what_the_run_itself_logged_last(trained: Path):
    card = evaluate_run(trained)
    assert card.step == 3
    again = dict(card.figures)
    assert again == pytest.approx(evaluations(trained)[3], rel=1e-6)


@pytest.mark.distributed
def test_two_processes_of_pipeline_train_train_and_evaluate_as_one_does(
    two, config: Path, trained: Path
):
    two("burgess", 1)
    run_dir = config.with_name("two")
    np.testing.assert_allclose(logged(run_dir, *UPDATES), logged(trained, *UPDATES), rtol=1e-9)
    one, both = evaluations(trained), evaluations(run_dir)
    assert both.keys() == one.keys()
    for step, values in both.items():
        assert values == pytest.approx(one[step], rel=1e-6)
        assert values["eval/samples"] == num_held_out(config)
    again = evaluate_run(run_dir).figures  # by one process, what two had trained
    assert {name: again[name] for name in both[3]} == pytest.approx(both[3], rel=1e-6)
