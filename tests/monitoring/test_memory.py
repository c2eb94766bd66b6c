"""Peak memory: of a process by Linux, the largest of all processes, and the console's line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.monitoring.memory import GIB, PROCESS_PEAK, memory_line
from pipeline.train import train

GROWTH = """
import numpy as np
from pipeline.monitoring.memory import resident_peak

peaks = [resident_peak()]
for size in (1 << 30, 1 << 20):
    np.ones(size, np.uint8).sum()
    peaks.append(resident_peak())
print(*peaks)
"""

TWO_RANKS = """
import numpy as np
from pipeline.common.leaving import leave
from pipeline.distributed.runtime import Runtime
from pipeline.monitoring.memory import read_peak, resident_peak

runtime = Runtime.start(accumulation=1)
np.ones(1 + runtime.rank * (1 << 30), np.uint8).sum()
own = runtime.gather(resident_peak())
found = runtime.gather(read_peak(runtime))
if runtime.is_main:
    print("PEAKS", *own, *(value for peaks in found for value in peaks.values()))
leave(0)
"""


def test_the_peak_of_a_process_grows_with_what_it_uses_and_stays():
    argv = [sys.executable, "-c", GROWTH]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    start, grown, later = map(int, done.stdout.split())
    assert 0.5 * GIB < grown - start < 1.1 * GIB
    assert later == grown


@pytest.mark.distributed
def test_the_largest_process_counts(tmp_path: Path, run_processes):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    ended = run_processes(script, 2)
    assert ended.code == 0, ended.output
    [line] = [line for line in ended.output.splitlines() if line.startswith("PEAKS")]
    small, large, *found = map(int, line.split()[1:])
    assert large > small + GIB // 2
    assert min(found) >= large
    assert len(set(found)) == 1 == len(found) - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the same on a GPU")
def test_a_run_logs_the_peak_and_prints_it_once(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
):
    tree = {
        "run_dir": str(tmp_path / "run"),
        "data": {"path": str(tiny_shards), "decode": {"kind": "image", "size": 32}},
        "batch_size": 4,
        "num_steps": 3,
        "monitor": {"log_every_steps": 1, "num_images": 0, "wandb": {"mode": "disabled"}},
    }
    assert train(TrainConfig.model_validate_json(json.dumps(tree))) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    peaks = [record[PROCESS_PEAK] for record in map(json.loads, lines) if "train/loss" in record]
    assert len(peaks) == 3
    assert peaks == sorted(peaks)
    printed = capsys.readouterr().err
    [line] = re.findall(r"^peak memory of a process .* GiB$", printed, re.M)
    assert line == memory_line({PROCESS_PEAK: peaks[0]})


def test_nothing_is_said_where_nothing_is_known():
    assert memory_line({"train/loss": 1.0}) is None
