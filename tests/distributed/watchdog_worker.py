"""Processes that hang, each in its phase: watchdog_worker.py RUN LIMIT PHASE:STEP:DELAY ...

Process r takes the r-th of the last arguments: it works for DELAY seconds, and then hangs.
"""

import sys
import time
from pathlib import Path

from pipeline.distributed.outcome import Failures
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.watchdog import Watchdog, WatchdogConfig


def main(run: str, limit: str, *hangs: str) -> None:
    runtime = Runtime.start(accumulation=1)
    failures = Failures(Path(run), "attempt", runtime.rank, runtime.world)
    watchdog = Watchdog(WatchdogConfig(seconds=float(limit)), failures, runtime)
    phase, step, delay = hangs[runtime.rank].split(":")
    started = time.monotonic()
    while time.monotonic() - started < float(delay):
        watchdog.enter("update", 1)
        time.sleep(0.05)
    watchdog.enter(phase, int(step))
    time.sleep(120)


if __name__ == "__main__":
    main(*sys.argv[1:])
