"""DDP and ZeRO-1, 2 and 3 on two processes take the steps of one, from anybody's checkpoints.

Floats add up in another order when a batch is cut, and training amplifies it. So float32 is
compared in windows of ten steps that start from checkpoints of another strategy: losses, whole
gradients and their norms. Beside it stands one process that cuts its batch, which shows how much
the order of additions does by itself. `pytest -s` prints all as one table.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.held_out import evaluate_run
from tests.distributed.test_equivalence import (
    UPDATES,
    WORKER,
    Difference,
    config,
    difference,
    evaluations,
    here,
    logged,
)
from tests.processes import Result

__all__ = ["config"]  # a fixture

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]
ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = ("ddp", *ZERO)
# In test-all stage 1 stands behind: it differs from 2 by what is sharded only.
FEW = ("ddp", pytest.param("zero1", marks=pytest.mark.soak), "zero2", "zero3")
# A low rate: training amplifies rounding less.
SETTINGS = ("num_steps=20", "optimizer.learning_rate.peak=0.002")


@pytest.fixture
def two(run_processes: Callable[..., Result], config: Path, tmp_path: Path) -> Callable[..., Any]:
    """Record a run of two processes under a strategy."""

    def run(strategy: str, *overrides: str, windows: Path | str = "-") -> dict[str, Any]:
        out = tmp_path / f"{strategy}.npz"
        result = run_processes(WORKER, 2, out, windows, config, *overrides, strategy=strategy)
        assert result.code == 0, result.output
        with np.load(out) as found:
            arrays = dict(found)
        assert arrays["world"] == 2
        assert (arrays["wrapper"] == "DeepSpeedEngine") == (strategy in ZERO)
        return arrays

    return run


@pytest.fixture(scope="module")
def reference(config: Path) -> Callable[[], tuple[dict[str, Any], Path]]:
    """One process in float32, and the checkpoints at the start of its windows."""

    @cache
    def run() -> tuple[dict[str, Any], Path]:
        windows = config.with_name("windows")
        return here(config, *SETTINGS, windows=windows), windows

    return run


@pytest.fixture(scope="module")
def table() -> Iterator[Callable[..., None]]:
    """Add a row to the table that stands in docs/benchmarks.md; it is printed at the end."""
    rows: list[str] = []

    def add(who: str, accumulation: int, found: Difference, precision: str = "fp32") -> None:
        figures = " | ".join(f"{value:.1e}" for value in found)
        rows.append(f"| {who} | {precision} | {accumulation} | {figures} |")

    yield add
    head = "| processes | precision | accumulation | losses | gradients | norms |"
    print("", head, "|---|---|---|---|---|---|", *rows, sep="\n")


def check_close(found: Difference) -> None:
    """Raise unless losses, gradients and their norms agree but for rounding."""
    assert found.losses < 1e-4
    assert found.gradients < 5e-4
    assert found.norms < 5e-4


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_one_process_that_cuts_its_batch_shows_the_noise_floor(
    config: Path, reference, table, accumulation: int
):
    expected, windows = reference()
    found = here(config, *SETTINGS, f"accumulation={accumulation}", windows=windows)
    table("one", accumulation, difference(found, expected))
    check_close(difference(found, expected))
    # The same run again is the same to the last bit, and any other is not.
    assert (difference(found, expected).losses == 0) == (accumulation == 1)


@pytest.mark.parametrize(
    "accumulation",
    [2, *(pytest.param(number, marks=pytest.mark.soak) for number in (1, 4))],
)
@pytest.mark.parametrize("strategy", FEW)
def test_it_takes_the_steps_of_one_process(two, reference, table, strategy: str, accumulation: int):
    expected, windows = reference()
    found = two(strategy, *SETTINGS, f"accumulation={accumulation}", windows=windows)
    table(f"{strategy} x 2", accumulation, difference(found, expected))
    check_close(difference(found, expected))
    assert difference(found, expected).losses > 0  # a run compared with itself would pass, too
    np.testing.assert_allclose(
        found["norms"], np.linalg.norm(found["gradients"], axis=1), rtol=1e-5
    )
    assert (found["weights"].sum(axis=1) == expected["weights"][:, 0]).all()


@pytest.mark.soak  # in test-all `test_elastic` changes the strategy three times
@pytest.mark.parametrize(("writer", "reader"), [*permutations(STRATEGIES, 2)])
def test_it_goes_on_from_another_strategys_checkpoint(two, tmp_path, writer: str, reader: str):
    windows = tmp_path / "windows"
    expected = two(writer, *SETTINGS, windows=windows)
    assert (windows / "step-10" / "optimizer.safetensors").exists()
    check_close(difference(two(reader, *SETTINGS, windows=windows), expected))


@pytest.mark.parametrize(
    "strategy", ["zero3", *(pytest.param(s, marks=pytest.mark.soak) for s in STRATEGIES[:-1])]
)
def test_bf16_keeps_parameters_in_float32_and_stays_near(two, reference, table, strategy: str):
    expected, windows = reference()
    found = two(strategy, *SETTINGS, "precision=bf16", windows=windows)
    table(f"{strategy} x 2", 1, difference(found, expected), "bf16")
    assert found["parameters"].dtype == found["gradients"].dtype == np.float32
    assert 1e-6 < difference(found, expected).losses < 2e-2


@pytest.mark.parametrize(
    "strategy", [*(pytest.param(s, marks=pytest.mark.soak) for s in STRATEGIES[:-1]), "zero3"]
)
def test_an_evaluation_leaves_no_trace(run_processes, config: Path, tmp_path, strategy: str):
    """ZeRO-3 keeps parameters whole after a forward pass: averaged ones must not be trained on,
    nor raw ones be evaluated as averaged.
    """
    seldom, often = tmp_path / "seldom", tmp_path / "often"
    for run, every_steps in ((seldom, 100), (often, 1)):
        settings = (f"run_dir={run}", f"evaluation.every_steps={every_steps}", "num_steps=4")
        settings += ("optimizer.learning_rate.warmup_samples=0",)
        result = run_processes("pipeline.train", 2, config, *settings, strategy=strategy)
        assert result.code == 0, result.output
    assert len(evaluations(seldom)) == 2
    assert len(evaluations(often)) == 5
    assert logged(often, *UPDATES) == logged(seldom, *UPDATES)
    again = evaluate_run(often)  # by one process, from the checkpoint
    assert again.pop("step") == 4
    assert again["eval_ema/loss"] != pytest.approx(again["eval/loss"], rel=1e-3)
    for run in (seldom, often):
        assert evaluations(run)[4] == pytest.approx(again, rel=1e-6)


def test_float64_is_refused(run_processes, config: Path):
    result = run_processes(
        "pipeline.train", 2, config, "precision=fp64", "run_dir=" + str(config.with_name("fp64")),
        strategy="zero2",
    )  # fmt: skip
    assert result.code != 0
    assert "fp64 runs in one process or under DDP" in result.output
