"""The watchdog: a job that hangs is ended, and says where.

The training says what it is about to do (`enter`). If nothing new is said for too long, a thread of
that process prints the stacks of all its threads and leaves a report in the run directory (see
`outcome`). The watchdogs of the others see it and leave theirs, and the lowest of them tells who
stands where, and who left no report within the grace: it is stopped, dead or cut off, and killed if
it lives on the same machine. Then all end, and the launcher with them.
"""

import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from pipeline.common.component import Component
from pipeline.common.console import warn
from pipeline.common.errors import FAILED
from pipeline.common.files import write_json
from pipeline.distributed.outcome import FIRST, Failures
from pipeline.distributed.runtime import Runtime

Phase = Literal["start", "data", "update", "evaluation", "log", "checkpoint", "end"]
ORDER = get_args(Phase)  # of the phases that belong to one step
MIN_GRACE_SECONDS, MAX_GRACE_SECONDS = 10.0, 60.0  # shared disks show others' files late
_POLL_SECONDS = 0.5


class WatchdogConfig(Component):
    """When a process that makes no progress counts as hanging."""

    # Longer than any honest wait: compiling, one batch from slow storage, one checkpoint.
    seconds: float | None = Field(default=900.0, gt=0)  # null: never

    @property
    def grace(self) -> float:
        """Seconds in which the other processes are to notice, and leave their reports."""
        limit = self.seconds or 0.0
        return min(max(limit / 10, MIN_GRACE_SECONDS), MAX_GRACE_SECONDS)

    @property
    def collective_timeout(self) -> float | None:
        """Seconds that a collective waits for a process: the watchdog is to bark before."""
        return None if self.seconds is None else self.seconds + 3 * self.grace


@dataclass(frozen=True)
class _Host:
    """Where a process lives."""

    host: str
    pid: int
    machine: str  # equal where one process may signal the other by its pid

    @classmethod
    def here(cls) -> "_Host":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(
            socket.gethostname(), os.getpid(), boot + str(Path("/proc/self/ns/pid").readlink())
        )


@dataclass(frozen=True)
class Report:
    """Where a process stands."""

    rank: int
    host: str
    pid: int
    phase: Phase
    step: int
    seconds: float = 0.0  # since it entered the phase

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (process {self.pid} on {self.host}) has been in phase "
            f"{self.phase} of step {self.step:,} for {self.seconds:.0f} s"
        )


def _flight_record() -> bytes:
    """Return what PyTorch's flight recorder holds: the last collectives of this process, pickled.

    NCCL has a recorder of its own, in a build that has NCCL.
    """
    bindings: Any = importlib.import_module("torch._C._distributed_c10d")
    return getattr(bindings, "_dump_nccl_trace", bindings._dump_fr_trace)()


class Watchdog:
    """Watches this process from a thread; every process has one."""

    def __init__(self, config: WatchdogConfig, failures: Failures, runtime: Runtime) -> None:
        """Start watching; a collective."""
        self._config = config
        self._failures = failures
        self._rank = runtime.rank
        self._peers: list[_Host] = runtime.gather(_Host.here())
        self._now: tuple[Phase, int, object] = ("start", 0, object())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if config.seconds is not None:
            self._thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Say what comes next for this step, or that it still goes on."""
        self._now = (phase, step, object())  # unlike the last, also in the same phase

    @contextmanager
    def phase(self, phase: Phase, step: int) -> Generator[None]:
        """Enter a phase twice: what is inside has the whole time limit, and so has what follows."""
        self.enter(phase, step)
        yield
        self.enter(phase, step)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        limit = self._config.seconds
        assert limit is not None
        interval = min(limit / 10, self._config.grace / 5)
        seen, seconds, last = self._now, 0.0, time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            # A whole process that stood still, with this thread, has not been hanging meanwhile.
            seconds += min(now - last, 2 * interval)
            last = now
            if self._now is not seen:
                seen, seconds = self._now, 0.0
            if seconds > limit or self._reports():
                self._end_job(seconds)

    def _reports(self) -> list[str]:
        """The names of the reports that are there."""
        try:
            return [path.name for path in self._failures.folder.glob("rank-*.json")]
        except OSError:
            return []

    def _end_job(self, seconds: float) -> None:
        """Print, report, and end this process, whatever hangs: also the storage may."""
        timer = threading.Timer(2 * self._config.grace, os._exit, (FAILED,))
        timer.daemon = True
        timer.start()
        phase, step, _ = self._now
        me = self._peers[self._rank]
        mine = Report(self._rank, me.host, me.pid, phase, step, seconds)
        print(f"watchdog: {mine}, limit watchdog.seconds = {self._config.seconds}", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        try:
            self._leave(mine)
            reports = self._collect()
            if reports:
                self._conclude(reports)
        except (OSError, ValueError) as error:
            warn(f"the watchdog cannot do its work in {self._failures.folder}: {error}")
        finally:
            os._exit(FAILED)

    def _leave(self, mine: Report) -> None:
        folder = self._failures.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{mine.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_json(folder / f"rank-{mine.rank}.json", asdict(mine))
        # Before NCCL's timeout, at which PyTorch would; beside what follows, which must not wait.
        path = folder / f"collectives-rank-{mine.rank}"
        threading.Thread(target=lambda: path.write_bytes(_flight_record()), daemon=True).start()

    def _collect(self) -> dict[int, Report]:
        """Wait for the others' reports; empty if a lower rank will conclude, and has."""
        folder = self._failures.folder
        deadline = time.monotonic() + self._config.grace
        reports: dict[int, Report] = {}
        is_lowest = True
        while len(reports) < len(self._peers) and time.monotonic() < deadline:
            if (folder / FIRST).exists():
                return {}
            time.sleep(_POLL_SECONDS)
            names = self._reports()
            is_lowest = all(int(name[5:-5]) >= self._rank for name in names)
            for name in names if is_lowest else ():
                rank = int(name[5:-5])
                if rank not in reports:
                    reports[rank] = Report(**json.loads((folder / name).read_bytes()))
        return reports if is_lowest else {}

    def _conclude(self, reports: dict[int, Report]) -> None:
        """Name who hangs, end who cannot do so itself, and record it."""
        grace = self._config.grace
        silent = [rank for rank in range(len(self._peers)) if rank not in reports]
        lines = [str(report) for _, report in sorted(reports.items())]
        lines += [
            f"rank {rank} (process {self._peers[rank].pid} on {self._peers[rank].host}) left no "
            f"report within {grace:.0f} s: stopped, dead or cut off"
            for rank in silent
        ]
        if not silent:
            last = min(reports.values(), key=lambda r: (r.step, ORDER.index(r.phase), r.rank))
            lines.append(f"rank {last.rank} is the furthest behind")
        message = f"no progress for {self._config.seconds:g} s: {'; '.join(lines)}"
        self._failures.record(message)
        print(f"watchdog: {message}. The job ends.", file=sys.stderr, flush=True)
        for rank in silent:
            if self._peers[rank].machine == self._peers[self._rank].machine:
                with suppress(ProcessLookupError):  # it is dead already
                    os.kill(self._peers[rank].pid, signal.SIGKILL)
