"""How a start of a run ended: `outcome.json`, for launchers, which do not pass on exit codes.

When one process fails, the others fail as a consequence. The process that fails first records why:
in `outcome.json`, and in a folder of this start below `failure/`, which the next start removes:

    first.json    rank and message of the process that failed first
    rank-N.txt    the traceback of process N, or, if it hung, the stacks of its threads
    rank-N.json   phase and step of process N when it hung: see `watchdog`
"""

import shutil
import traceback
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipeline.common.console import warn
from pipeline.common.errors import FAILED, WRONG_USE, UserError
from pipeline.common.files import canonical_json, create_exclusive, write_atomic, write_json

FAILURE, FIRST = "failure", "first.json"
_MEMORY_RAN_OUT = ("out of memory", "can't allocate memory")  # CUDA's, the CPU allocator's


@dataclass(frozen=True)
class Outcome:
    """How a start of a run ended, or that it is running."""

    status: Literal["running", "done", "preempted", "failed"]
    exit_code: int | None
    step: int | None
    message: str = ""


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Publish outcome.json."""
    write_json(run_dir / "outcome.json", asdict(outcome))


def begin(run_dir: Path) -> str:
    """Remove the failures of earlier starts, record that this one runs, and return its name."""
    if (run_dir / FAILURE).exists():
        shutil.rmtree(run_dir / FAILURE)
    write_outcome(run_dir, Outcome("running", exit_code=None, step=None))
    return uuid.uuid4().hex[:8]


class Failures:
    """Where one process of a start records why it fails."""

    def __init__(self, run_dir: Path, attempt: str, rank: int, world: int) -> None:
        """attempt: the name of this start, by `begin`: late processes of another start differ."""
        self.folder = run_dir / FAILURE / attempt
        self._run_dir = run_dir
        self._rank = rank
        self._world = world
        self._is_recorded = False

    @contextmanager
    def recorded(self) -> Generator[None]:
        """Record an exception that leaves the context, unless an inner context has recorded it.

        The process that failed first raises it again. The others fail as a consequence: they print
        one line and exit; their tracebacks are in failure/. A UserError is raised on all.
        """
        try:
            yield
        except BaseException as error:
            if self._is_recorded:
                raise
            self._is_recorded = True
            if self._record_exception(error) or isinstance(error, UserError):
                raise
            warn(
                f"rank {self._rank} ends as well ({type(error).__name__}): see "
                f"{self._run_dir}/outcome.json"
            )
            raise SystemExit(FAILED) from error

    def record(self, message: str, *, exit_code: int = FAILED, details: str = "") -> bool:
        """Record why this process fails; return whether it is the first to fail.

        details: for rank-N.txt. If nothing can be written, every process counts as the first.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if details:
                write_atomic(self.folder / f"rank-{self._rank}.txt", details.encode())
            first = canonical_json({"rank": self._rank, "why": message})
            if not create_exclusive(self.folder / FIRST, first):
                return False
            write_outcome(self._run_dir, Outcome("failed", exit_code, None, message))
        except OSError as error:
            warn(f"the failure of this run could not be recorded in {self._run_dir} ({error})")
        return True

    def _record_exception(self, error: BaseException) -> bool:
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, UserError):  # raised on all processes
            return self.record(message, exit_code=WRONG_USE)
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _MEMORY_RAN_OUT):
            message += (
                " (a larger accumulation, a smaller batch_size or model.gradient_checkpointing "
                "needs less memory)"
            )
        if self._world > 1:
            message = f"rank {self._rank}: {message}"
        return self.record(message, details="".join(traceback.format_exception(error)))
