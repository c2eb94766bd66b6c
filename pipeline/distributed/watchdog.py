"""The watchdog: ends a job that hangs, and reports where each process was.

The training names the phase that it enters (`enter`). If a process enters none for too long, its
watchdog thread prints the stacks of all threads and writes a report into the run directory (see
`outcome`). The other watchdogs see that report and write theirs. The lowest rank that reported
records the phase of each process, and which processes wrote no report within the grace period:
these are stopped, dead or cut off, and are killed if they run on the same machine. Then all
processes end, and the launcher with them.
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
PHASES = get_args(Phase)  # in the order in which a step goes through them
MIN_GRACE_SECONDS, MAX_GRACE_SECONDS = 10.0, 60.0  # a shared disk shows new files late
_POLL_SECONDS = 0.5


class WatchdogConfig(Component):
    """When a process that makes no progress counts as hanging."""

    # Longer than any regular wait: compiling, one batch from slow storage, one checkpoint.
    seconds: float | None = Field(default=900.0, gt=0)  # null: never

    @property
    def grace(self) -> float:
        """Seconds that the other processes have to write their reports."""
        limit = self.seconds or 0.0
        return min(max(limit / 10, MIN_GRACE_SECONDS), MAX_GRACE_SECONDS)

    @property
    def collective_timeout(self) -> float | None:
        """Timeout of collectives in seconds: longer than the watchdog's, which reports first."""
        return None if self.seconds is None else self.seconds + 3 * self.grace


@dataclass(frozen=True)
class _Host:
    """Host and id of a process."""

    host: str
    pid: int
    machine: str  # equal for two processes if one can signal the other by its pid

    @classmethod
    def current(cls) -> "_Host":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(
            socket.gethostname(), os.getpid(), boot + str(Path("/proc/self/ns/pid").readlink())
        )


@dataclass(frozen=True)
class Report:
    """Phase and step of a process."""

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
    """Return the content of PyTorch's flight recorder, pickled: the last collectives.

    Builds with NCCL have another recorder for NCCL.
    """
    bindings: Any = importlib.import_module("torch._C._distributed_c10d")
    return getattr(bindings, "_dump_nccl_trace", bindings._dump_fr_trace)()


class Watchdog:
    """Watches its own process from a thread; every process has one."""

    def __init__(self, config: WatchdogConfig, failures: Failures, runtime: Runtime) -> None:
        """Start watching; a collective."""
        self._config = config
        self._failures = failures
        self._rank = runtime.rank
        self._peers: list[_Host] = runtime.gather(_Host.current())
        self._now: tuple[Phase, int, object] = ("start", 0, object())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if config.seconds is not None:
            self._thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Name the phase that begins; entering the same phase again counts as progress."""
        self._now = (phase, step, object())  # never equal to the last one

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
            # The time in which the whole process was suspended, with this thread, does not count.
            seconds += min(now - last, 2 * interval)
            last = now
            if self._now is not seen:
                seen, seconds = self._now, 0.0
            if seconds > limit or self._reports():
                self._end_job(seconds)

    def _reports(self) -> list[str]:
        """Names of the reports that exist."""
        try:
            return [path.name for path in self._failures.folder.glob("rank-*.json")]
        except OSError:
            return []

    def _end_job(self, seconds: float) -> None:
        """Print, report and end this process, even if the storage hangs as well."""
        timer = threading.Timer(2 * self._config.grace, os._exit, (FAILED,))
        timer.daemon = True
        timer.start()
        phase, step, _ = self._now
        me = self._peers[self._rank]
        mine = Report(self._rank, me.host, me.pid, phase, step, seconds)
        print(f"watchdog: {mine}, limit watchdog.seconds = {self._config.seconds}", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        try:
            self._write_report(mine)
            reports = self._collect_reports()
            if reports:
                self._record_cause(reports)
        except (OSError, ValueError) as error:
            warn(f"the watchdog cannot use {self._failures.folder}: {error}")
        finally:
            os._exit(FAILED)

    def _write_report(self, mine: Report) -> None:
        folder = self._failures.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{mine.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_json(folder / f"rank-{mine.rank}.json", asdict(mine))
        # PyTorch would write it at NCCL's timeout only. In a thread: it must not delay the rest.
        path = folder / f"collectives-rank-{mine.rank}"
        threading.Thread(target=lambda: path.write_bytes(_flight_record()), daemon=True).start()

    def _collect_reports(self) -> dict[int, Report]:
        """Wait for the other reports; return none if a lower rank records the cause."""
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

    def _record_cause(self, reports: dict[int, Report]) -> None:
        """Record which processes hang, and kill those that wrote no report."""
        grace = self._config.grace
        silent = [rank for rank in range(len(self._peers)) if rank not in reports]
        lines = [str(report) for _, report in sorted(reports.items())]
        lines += [
            f"rank {rank} (process {self._peers[rank].pid} on {self._peers[rank].host}) left no "
            f"report within {grace:.0f} s: stopped, dead or cut off"
            for rank in silent
        ]
        if not silent:
            last = min(reports.values(), key=lambda r: (r.step, PHASES.index(r.phase), r.rank))
            lines.append(f"rank {last.rank} is the furthest behind")
        message = f"no progress for {self._config.seconds:g} s: {'; '.join(lines)}"
        self._failures.record(message)
        print(f"watchdog: {message}. The job ends.", file=sys.stderr, flush=True)
        for rank in silent:
            if self._peers[rank].machine == self._peers[self._rank].machine:
                with suppress(ProcessLookupError):  # it is dead already
                    os.kill(self._peers[rank].pid, signal.SIGKILL)
