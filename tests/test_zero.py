"""ZeRO-1, 2 and 3 on two processes take the steps of one process, from anybody's checkpoints.

Compared as in `test_equivalence`: in windows of ten steps that start from checkpoints of another
strategy, so that rounding is not amplified; losses, whole gradients and their norms.
"""

from collections.abc import Callable
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import Result
from tests.test_equivalence import WORKER, config, difference, here

__all__ = ["config"]  # a fixture

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]
ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = ("ddp", *ZERO)
# A low rate: training amplifies rounding less.
SETTINGS = ("num_steps=20", "optimizer.learning_rate.peak=0.002")
# In test-all each strategy writes and reads once; the other pairs are soak.
RING = {("ddp", "zero1"), ("zero1", "zero3"), ("zero3", "zero2"), ("zero2", "ddp")}


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


def check_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise unless losses, gradients and their norms agree but for rounding."""
    losses, gradients = difference(found, expected)
    norms = np.abs(found["norms"] / expected["norms"] - 1).max()
    print(f"losses {losses:.1e}, gradients {gradients:.1e}, norms {norms:.1e}")
    assert losses < 1e-4
    assert gradients < 5e-4
    assert norms < 5e-4


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("strategy", ZERO)
def test_it_takes_the_steps_of_one_process(two, reference, strategy: str, accumulation: int):
    expected, windows = reference()
    found = two(strategy, *SETTINGS, f"accumulation={accumulation}", windows=windows)
    check_close(found, expected)
    assert (found["weights"].sum(axis=1) == expected["weights"][:, 0]).all()


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pair if pair in RING else pytest.param(*pair, marks=pytest.mark.soak)
        for pair in permutations(STRATEGIES, 2)
    ],
)
def test_it_goes_on_from_another_strategys_checkpoint(two, tmp_path, writer: str, reader: str):
    windows = tmp_path / "windows"
    expected = two(writer, *SETTINGS, windows=windows)
    assert (windows / "step-10" / "optimizer.safetensors").exists()
    check_close(two(reader, *SETTINGS, windows=windows), expected)


@pytest.mark.parametrize("strategy", ZERO)
def test_bf16_keeps_parameters_in_float32_and_stays_near(two, reference, strategy: str):
    expected, windows = reference()
    found = two(strategy, *SETTINGS, "precision=bf16", windows=windows)
    losses, _ = difference(found, expected)
    assert found["parameters"].dtype == found["gradients"].dtype == np.float32
    assert 1e-6 < losses < 2e-2


def test_float64_is_refused(run_processes, config: Path):
    result = run_processes(
        "pipeline.train", 2, config, "precision=fp64", "run_dir=" + str(config.with_name("fp64")),
        strategy="zero2",
    )  # fmt: skip
    assert result.code != 0
    assert "fp64 runs in one process or under DDP" in result.output


def test_being_told_to_stay_on_the_cpu_is_refused(run_processes, config: Path):
    """accelerate would train without DeepSpeed and say nothing."""
    result = run_processes(
        "pipeline.train", 2, config, "run_dir=" + str(config.with_name("cpu")),
        strategy="zero2", env={"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert result.code != 0
    assert "ACCELERATE_USE_CPU is set" in result.output
