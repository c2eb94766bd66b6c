"""The watchdog: a job that hangs is ended, and says where.

The training says what it is about to do (`enter`). If nothing new is said for too long, a thread of
each process that still runs prints the stacks of all its threads and leaves a report in the run
directory; the lowest such process tells who stands where. A process that left no report is stopped,
dead or cut off; it is killed if it lives on the same machine. Then all end, and the launcher with
them.

What is left in the run directory: see `outcome`.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field

from pipeline.component import Component
from pipeline.console import warn
from pipeline.errors import FAILED
from pipeline.files import write_json
from pipeline.outcome import FAILURE, record_failure
from pipeline.runtime import Runtime

# What a step consists of, in this order.
PHASES = ("start", "data", "update", "evaluation", "log", "checkpoint", "end")
GRACE_SECONDS = 10.0  # for the others' reports, and for a storage that hangs, too
_POLL_SECONDS = 0.2


class WatchdogConfig(Component):
    """When a process that makes no progress counts as hanging."""

    # Longer than any honest wait: compiling, one batch from slow storage, one checkpoint.
    seconds: float | None = Field(default=900.0, gt=0)  # null: never

    @property
    def patience(self) -> float | None:
        """Seconds that a collective waits for a process: the watchdog is to bark before."""
        return None if self.seconds is None else self.seconds + 3 * GRACE_SECONDS


@dataclass(frozen=True)
class Report:
    """Where a process stands."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    seconds: float = 0.0  # since it entered the phase

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (process {self.pid} on {self.host}) has been in phase "
            f"{self.phase} of step {self.step:,} for {self.seconds:.0f} s"
        )


class Watchdog:
    """Watches this process from a thread; every process has one."""

    def __init__(self, run_dir: Path, config: WatchdogConfig, runtime: Runtime) -> None:
        """Start watching; a collective."""
        self._folder = run_dir / FAILURE
        self._run_dir = run_dir
        self._limit = config.seconds
        self._rank = runtime.rank
        self._peers: list[tuple[str, int]] = runtime.gather((socket.gethostname(), os.getpid()))
        self._now = ("start", 0, object())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._limit is not None:
            self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Say what comes next (one of PHASES), or that it still goes on."""
        self._now = (phase, step, object())  # unlike the last, also in the same phase

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _report(self, seconds: float) -> Report:
        phase, step, _ = self._now
        host, pid = self._peers[self._rank]
        return Report(self._rank, host, pid, phase, step, seconds)

    def _watch(self) -> None:
        assert self._limit is not None
        interval = min(self._limit / 10, 1.0)
        seen, seconds, last = self._now, 0.0, time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            # A whole process that stood still, with this thread, has not been hanging meanwhile.
            seconds += min(now - last, 2 * interval)
            last = now
            if self._now is not seen:
                seen, seconds = self._now, 0.0
            elif seconds > self._limit:
                self._end_job(self._report(seconds))

    def _end_job(self, mine: Report) -> None:
        """Print, report, and end this process, whatever hangs: also the storage may."""
        timer = threading.Timer(2 * GRACE_SECONDS, os._exit, (FAILED,))
        timer.daemon = True
        timer.start()
        print(f"watchdog: {mine}, limit watchdog.seconds = {self._limit}", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        try:
            self._leave(mine)
            reports = self._collect()
            if min(reports) == self._rank:
                self._conclude(reports)
        except OSError as error:
            warn(f"the watchdog cannot leave its report: {error}")
        finally:
            os._exit(FAILED)

    def _leave(self, mine: Report) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / f"rank-{mine.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_json(self._folder / f"rank-{mine.rank}.json", asdict(mine))

    def _collect(self) -> dict[int, Report]:
        """Wait for the others' reports; those that do not come in time are missing."""
        deadline = time.monotonic() + GRACE_SECONDS
        reports: dict[int, Report] = {}
        while len(reports) < len(self._peers) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            for path in self._folder.glob("rank-*.json"):
                report = Report(**json.loads(path.read_bytes()))
                reports[report.rank] = report
        return reports

    def _conclude(self, reports: dict[int, Report]) -> None:
        """Name who hangs, end who cannot do so itself, and record it."""
        silent = [rank for rank in range(len(self._peers)) if rank not in reports]
        lines = [str(report) for _, report in sorted(reports.items())]
        for rank in silent:
            host, pid = self._peers[rank]
            lines.append(
                f"rank {rank} (process {pid} on {host}) does not answer: stopped, dead or cut off"
            )
        if not silent:
            last = min(reports.values(), key=lambda r: (r.step, PHASES.index(r.phase), r.rank))
            lines.append(f"rank {last.rank} is the furthest behind")
        message = f"no progress for {self._limit:g} s: {'; '.join(lines)}"
        record_failure(self._run_dir, message, rank=self._rank)
        print(f"watchdog: {message}. The job ends.", file=sys.stderr, flush=True)
        for rank in silent:
            host, pid = self._peers[rank]
            if host == self._peers[self._rank][0]:
                os.kill(pid, signal.SIGKILL)
