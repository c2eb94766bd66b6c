"""What a process holds for each parameter is what docs/clusters.md says, under every strategy."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_equivalence import config
from tests.processes import ROOT, Result

__all__ = ["config"]  # a fixture

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(180)]
WORKER = ROOT / "tests/distributed/state_memory_worker.py"
LARGE = "model.backbone={kind: mlp, hidden: [512, 512]}"  # 3.7 M parameters
ROW = re.compile(r"^\| `(ddp|zero[123])` \|.*\| ([^|]+?) \|$", re.MULTILINE)


def bytes_per_parameter(strategy: str, num_ranks: int) -> float:
    """The last column of the page's table: 20, or 8 + 16 / R."""
    rows = dict(ROW.findall((ROOT / "docs/clusters.md").read_text()))
    parts = [part.split("/") for part in rows[strategy].split("+")]
    return sum(float(part[0]) / (num_ranks if len(part) > 1 else 1) for part in parts)


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero1", marks=pytest.mark.soak), "zero2", "zero3"]
)
def test_the_page_says_what_is_held(
    strategy: str, run_processes: Callable[..., Result], config: Path, tmp_path: Path
):
    out = tmp_path / "held.json"
    result = run_processes(WORKER, 2, config, out, LARGE, strategy=strategy)
    assert result.code == 0, result.output
    found = json.loads(out.read_text())
    bucket = 0
    if strategy == "zero3":  # the one buffer that is held between steps
        settings = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
        bucket = 4 * settings["zero_optimization"]["reduce_bucket_size"]
    held = (found["held"] - bucket) / found["parameters"]
    assert held == pytest.approx(bytes_per_parameter(strategy, 2), rel=0.01)
