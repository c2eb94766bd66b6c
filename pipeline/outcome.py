"""How a start of a run ended: `outcome.json`, the contract with launchers, who flatten exit codes.

A process that fails takes its peers with it, and they fail, too. So the first that fails says why:
in `outcome.json`, and in the folder `failure/`, which the next start removes:

    first.json    rank and message of the process that failed first
    rank-N.txt    the traceback of process N, or, if it hung, the stacks of its threads
    rank-N.json   where process N stood when it hung: see `watchdog`
"""

import shutil
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipeline.console import warn
from pipeline.errors import FAILED, WRONG_USE, UserError
from pipeline.files import canonical_json, create_exclusive, write_atomic, write_json

FAILURE = "failure"
_MEMORY_RAN_OUT = ("out of memory", "can't allocate memory")  # CUDA's, the CPU allocator's


@dataclass(frozen=True)
class Outcome:
    """How a start of a run ended (or that it has not ended)."""

    status: Literal["running", "done", "preempted", "failed"]
    exit_code: int | None
    step: int | None
    message: str = ""


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Publish outcome.json."""
    write_json(run_dir / "outcome.json", asdict(outcome))


def begin(run_dir: Path) -> None:
    """Forget how the last start failed, and say that this one runs."""
    shutil.rmtree(run_dir / FAILURE, ignore_errors=True)
    write_outcome(run_dir, Outcome("running", exit_code=None, step=None))


def record_failure(
    run_dir: Path, message: str, *, rank: int, exit_code: int = FAILED, details: str = ""
) -> bool:
    """Record why a process fails; tell whether it is the first to do so, whose word counts.

    details: for failure/rank-N.txt. Where nothing can be written, each process has its own word.
    """
    folder = run_dir / FAILURE
    try:
        folder.mkdir(exist_ok=True)
        if details:
            write_atomic(folder / f"rank-{rank}.txt", details.encode())
        first = canonical_json({"rank": rank, "why": message})
        if not create_exclusive(folder / "first.json", first):
            return False
        write_outcome(run_dir, Outcome("failed", exit_code, step=None, message=message))
    except OSError as error:
        warn(f"how this run failed could not be recorded in {run_dir} ({error})")
    return True


def record_exception(run_dir: Path, error: BaseException, *, rank: int, world: int) -> bool:
    """Record the exception that ends a process: see `record_failure`."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):  # of all processes alike
        return record_failure(run_dir, message, rank=rank, exit_code=WRONG_USE)
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _MEMORY_RAN_OUT):
        message += (
            " (less memory is needed with a larger accumulation, a smaller batch_size, or "
            "model.gradient_checkpointing)"
        )
    if world > 1:
        message = f"rank {rank}: {message}"
    details = "".join(traceback.format_exception(error))
    return record_failure(run_dir, message, rank=rank, details=details)
