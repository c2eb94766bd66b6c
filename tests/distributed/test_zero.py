"""DDP and ZeRO-1, 2 and 3 on two processes take the steps of one, from anybody's checkpoints.

Floats add up in another order when a batch is cut, and training amplifies it. So float32 is
compared in windows of some steps that start from checkpoints of another strategy: losses, whole
gradients and their norms. Beside it stands one process that cuts its batch, which shows how much
the order of additions does by itself. `pytest -s` prints all as one table.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.trained import evaluate_run
from tests.distributed.in_turn import words
from tests.distributed.models import MODELS, WINDOW_STEPS
from tests.distributed.test_equivalence import (
    UPDATES,
    WORKER,
    Difference,
    config,
    difference,
    each_model,
    evaluations,
    here,
    logged,
)
from tests.processes import ROOT, Processes, Result, argv_of, env_of

__all__ = ["config"]  # a fixture

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(900)]
ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = ("ddp", *ZERO)
# In test-all stage 1 stands behind: it differs from 2 by what is sharded only.
FEW = ("ddp", pytest.param("zero1", marks=pytest.mark.soak), "zero2", "zero3")
# A low rate: training amplifies rounding less. No step depends on num_steps.
RATE = "optimizer.learning_rate={peak: 0.002, final: 0.002, warmup_samples: 32}"


def settings_of(model: str, *, windows: int = 2) -> tuple[str, ...]:
    """A run of some windows."""
    steps = WINDOW_STEPS[model]
    cut = (f"num_steps={windows * steps}", f"checkpoint.every_steps={steps}")
    return (RATE, *cut, *MODELS[model])


LARGE = "model.backbone={kind: mlp, hidden: [512, 512]}"  # 3.7 M parameters
ROW = re.compile(r"^\| `(ddp|zero[123])` \|.*\| ([^|]+?) \|$", re.MULTILINE)


def read(path: Path, strategy: str) -> dict[str, Any]:
    """What two processes recorded under a strategy."""
    with np.load(path) as found:
        arrays = dict(found)
    assert arrays["world"] == 2
    assert (arrays["wrapper"] == "DeepSpeedEngine") == (strategy in ZERO)
    return arrays


@pytest.fixture
def two(run_processes: Callable[..., Result], config: Path, tmp_path: Path) -> Callable[..., Any]:
    """Record a run of two processes under a strategy."""

    def run(strategy: str, *overrides: str, windows: Path | str = "-") -> dict[str, Any]:
        out = tmp_path / f"{strategy}.npz"
        argv = (WORKER, 2, "record", out, windows, config, *overrides)
        result = run_processes(*argv, strategy=strategy)
        assert result.code == 0, result.output
        return read(out, strategy)

    return run


@pytest.fixture(scope="module")
def reference(config: Path) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """One process in float32, and the checkpoints at the start of its windows; by model."""

    @cache
    def run(model: str) -> tuple[dict[str, Any], Path]:
        windows = config.with_name(f"windows-{model}")
        return here(config, *settings_of(model), windows=windows), windows

    return run


@pytest.fixture(scope="module")
def started(
    config: Path, reference: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """Do all that is asked of a strategy and an accumulation, in one start; where it lies."""

    @cache
    def run(strategy: str, accumulation: int) -> Path:
        out = tmp_path_factory.mktemp(f"{strategy}-{accumulation}")
        cut = f"accumulation={accumulation}"
        jobs: list[list[object]] = []
        if accumulation == 2:
            jobs.append(["hold", config, out / "held.json", LARGE])
        for model in MODELS:
            job = [reference(model)[1], config, cut]
            # It changes no number, and needs the hooks of ZeRO-3 within the stages.
            checkpointing = f"model.gradient_checkpointing={str(model == 'resnet-mini').lower()}"
            fp32 = (*settings_of(model), checkpointing)
            jobs.append(["record", out / f"{model}-fp32.npz", *job, *fp32])
            if accumulation == 2:
                bf16 = (*settings_of(model, windows=1), "precision=bf16")
                jobs.append(["record", out / f"{model}-bf16.npz", *job, *bf16])
        argv = [*argv_of(WORKER, 2, strategy), *words(*jobs)]
        ended = Processes(argv, out / "log", env=env_of(strategy), cwd=ROOT, forked=True).wait(600)
        assert ended.code == 0, ended.output
        return out

    return run


@pytest.fixture(scope="module")
def table() -> Iterator[Callable[..., None]]:
    """Add a row to the table that stands in docs/benchmarks.md; it is printed at the end."""
    rows: list[str] = []

    def add(
        who: str, model: str, accumulation: int, found: Difference, precision: str = "fp32"
    ) -> None:
        figures = " | ".join(f"{value:.1e}" for value in found)
        rows.append(f"| {who} | {model} | {precision} | {accumulation} | {figures} |")

    yield add
    head = "| processes | model | precision | accumulation | losses | gradients | norms |"
    print("", head, "|---|---|---|---|---|---|---|", *rows, sep="\n")


def check_close(found: Difference) -> None:
    """Raise unless losses, gradients and their norms agree but for rounding."""
    assert found.losses < 1e-4
    assert found.gradients < 5e-4
    assert found.norms < 5e-4


@pytest.mark.parametrize(
    ("model", "accumulation"), [("burgess", 1), ("burgess", 2), ("burgess", 4), ("resnet-mini", 2)]
)
def test_one_process_that_cuts_its_batch_shows_the_noise_floor(
    config: Path, reference, table, model: str, accumulation: int
):
    expected, windows = reference(model)
    cut = f"accumulation={accumulation}"
    found = here(config, *settings_of(model), cut, windows=windows)
    table("one", model, accumulation, difference(found, expected))
    check_close(difference(found, expected))
    # The same run again is the same to the last bit, and any other is not.
    assert (difference(found, expected).losses == 0) == (accumulation == 1)


@pytest.mark.parametrize(
    "accumulation",
    [2, *(pytest.param(number, marks=pytest.mark.soak) for number in (1, 4))],
)
@pytest.mark.parametrize("strategy", FEW)
@each_model
def test_it_takes_the_steps_of_one_process(
    started, reference, table, model: str, strategy: str, accumulation: int
):
    expected, _ = reference(model)
    found = read(started(strategy, accumulation) / f"{model}-fp32.npz", strategy)
    table(f"{strategy} x 2", model, accumulation, difference(found, expected))
    check_close(difference(found, expected))
    assert difference(found, expected).losses > 0  # a run compared with itself would pass, too
    np.testing.assert_allclose(
        found["norms"], np.linalg.norm(found["gradients"], axis=1), rtol=1e-5
    )
    assert (found["weights"].sum(axis=1) == expected["weights"][:, 0]).all()


@pytest.mark.parametrize("strategy", FEW)
@each_model
def test_bf16_keeps_parameters_in_float32_and_stays_near(
    started, reference, table, model: str, strategy: str
):
    found = read(started(strategy, 2) / f"{model}-bf16.npz", strategy)
    whole, _ = reference(model)
    columns = ("losses", "gradients", "norms")
    apart = difference(found, {name: whole[name][: len(found[name])] for name in columns})
    table(f"{strategy} x 2", model, 2, apart, "bf16")
    assert found["parameters"].dtype == found["gradients"].dtype == np.float32
    assert 1e-6 < apart.losses < 2e-2


def bytes_per_parameter(strategy: str, num_ranks: int) -> float:
    """The last column of the table in docs/clusters.md: 20, or 8 + 16 / R."""
    rows = dict(ROW.findall((ROOT / "docs/clusters.md").read_text()))
    parts = [part.split("/") for part in rows[strategy].split("+")]
    return sum(float(part[0]) / (num_ranks if len(part) > 1 else 1) for part in parts)


@pytest.mark.parametrize("strategy", FEW)
def test_a_process_holds_for_each_parameter_what_the_page_says(started, strategy: str):
    found = json.loads((started(strategy, 2) / "held.json").read_text())
    bucket = 0
    if strategy == "zero3":  # the one buffer that is held between steps
        settings = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
        bucket = 4 * settings["zero_optimization"]["reduce_bucket_size"]
    held = (found["held"] - bucket) / found["parameters"]
    assert held == pytest.approx(bytes_per_parameter(strategy, 2), rel=0.01)


@pytest.mark.soak  # in test-all `test_elastic` changes the strategy three times
@pytest.mark.parametrize(("writer", "reader"), [*permutations(STRATEGIES, 2)])
@each_model
def test_it_goes_on_from_another_strategys_checkpoint(
    two, tmp_path, model: str, writer: str, reader: str
):
    windows, settings = tmp_path / "windows", settings_of(model)
    expected = two(writer, *settings, windows=windows)
    assert (windows / f"step-{WINDOW_STEPS[model]}" / "optimizer.safetensors").exists()
    check_close(difference(two(reader, *settings, windows=windows), expected))


@pytest.fixture(scope="module")
def evaluated(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train each model twice, with few evaluations and with many, in one start."""

    @cache
    def run(strategy: str) -> Path:
        out = tmp_path_factory.mktemp(f"evaluated-{strategy}")
        jobs: list[list[object]] = []
        for model, settings in MODELS.items():
            for name, every_steps in (("seldom", 100), ("often", 1)):
                when = (f"evaluation.every_steps={every_steps}", "num_steps=4")
                when += ("optimizer.learning_rate.warmup_samples=0",)
                run_dir = f"run_dir={out / f'{model}-{name}'}"
                jobs.append(["train", config, run_dir, *when, *settings])
        argv = [*argv_of(WORKER, 2, strategy), *words(*jobs)]
        ended = Processes(argv, out / "log", env=env_of(strategy), cwd=ROOT, forked=True).wait(600)
        assert ended.code == 0, ended.output
        return out

    return run


@pytest.mark.parametrize(
    "strategy", [*(pytest.param(s, marks=pytest.mark.soak) for s in STRATEGIES[:-1]), "zero3"]
)
@each_model
def test_an_evaluation_leaves_no_trace(evaluated, strategy: str, model: str):
    """ZeRO-3 keeps parameters whole after a forward pass: averaged ones must not be trained on,
    nor raw ones be evaluated as averaged.
    """
    seldom, often = (evaluated(strategy) / f"{model}-{name}" for name in ("seldom", "often"))
    assert len(evaluations(seldom)) == 2
    assert len(evaluations(often)) == 5
    assert logged(often, *UPDATES) == logged(seldom, *UPDATES)
    card = evaluate_run(often)  # by one process, from the checkpoint
    assert card.step == 4
    again = dict(card.figures)
    assert again["eval_ema/loss"] != pytest.approx(again["eval/loss"], rel=1e-3)
    for run in (seldom, often):
        assert evaluations(run)[4] == pytest.approx(again, rel=1e-6)


def test_float64_is_refused(run_processes, config: Path):
    result = run_processes(
        "pipeline.train", 1, config, "precision=fp64", "run_dir=" + str(config.with_name("fp64")),
        strategy="zero2",
    )  # fmt: skip
    assert result.code != 0
    assert "fp64 runs in one process or under DDP" in result.output
