"""How processes end: with their exit codes, and after the one that prints the error."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LEAVES = """
import atexit, sys
import torch.distributed as dist
from pipeline.common.leaving import leave

class Witness:
    def __del__(self):
        print("taken down")

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
witness = Witness()
atexit.register(lambda: print("exit function", dist.is_initialized()))
leave(int(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, printed",
    [(0, "exit function False\ntaken down\n"), (2, "exit function True\n")],
    ids=["done", "error"],
)
def test_a_process_of_a_group_ends_with_its_code(tmp_path: Path, code: int, printed: str):
    """Done, it leaves the group first; after an error nothing is taken down."""
    argv = [sys.executable, "-c", LEAVES, tmp_path / "store", str(code)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")


@pytest.mark.slow
def test_a_rank_of_an_export_lets_the_one_that_prints_end_first(tmp_path: Path):
    """Under torchrun, which ends all others as soon as one has ended."""
    argv = [sys.executable, "-m", "pipeline.export", tmp_path / "none.yaml"]
    env = os.environ | {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "1", "RANK": "1"}
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(8)  # it has read its arguments by then
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=5) == (None, "")
    assert process.returncode == -signal.SIGTERM
