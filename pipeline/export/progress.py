"""Prints a line on stderr at intervals: images/s, share done, time left.

The share counts the rows of all commit records, of any process; the rate is that of all processes
since this one started.
"""

import sys
import time
from collections.abc import Callable, Sequence

from pipeline.export.layout import ExportDir
from pipeline.export.plan import ExportPlan, Task

PERIOD_SECONDS = 2.0
LISTING_SHARE = 0.05  # of the time, at most, is spent on listing the commit records


class Progress:
    """Rows done by all processes; prints nothing unless `enabled`."""

    def __init__(
        self,
        export: ExportDir,
        plan: ExportPlan,
        *,
        enabled: bool,
        write: Callable[[str], object] = sys.stderr.write,
    ) -> None:
        self._export = export
        self._tasks: Sequence[Task] = plan.tasks
        self._total = plan.rows
        self._enabled = enabled
        self._write = write
        self._start = self._last = time.monotonic()
        self._own_rows = self._last_done = 0
        self._period = PERIOD_SECONDS
        self._done_at_start = self._done() if enabled else 0

    def _done(self) -> int:
        start = time.monotonic()
        try:
            committed = self._export.committed(task.name for task in self._tasks)
        except OSError as error:  # the work itself reports it, if it lasts
            self._write(f"export: the commit records cannot be listed now ({error})\n")
            return self._last_done
        self._period = max(PERIOD_SECONDS, (time.monotonic() - start) / LISTING_SHARE)
        self._last_done = sum(task.rows for task in self._tasks if task.name in committed)
        return self._last_done

    def advance(self, rows: int) -> None:
        """Count rows encoded here; print a line if the last one is old enough."""
        self._own_rows += rows
        if self._enabled and time.monotonic() - self._last >= self._period:
            self.report()

    def report(self) -> None:
        """Print a line now."""
        if not self._enabled:
            return
        self._last = time.monotonic()
        done = self._done()
        new = max(done - self._done_at_start, self._own_rows)
        rate = new / max(self._last - self._start, 1e-9)
        done = min(self._total, max(done, self._done_at_start + self._own_rows))
        left = f"{(self._total - done) / rate:,.0f} s left" if rate else "time left unknown"
        share = done / self._total if self._total else 1.0
        line = f"export: {done:,} of {self._total:,} images ({share:.0%}), {rate:,.0f}/s, {left}"
        self._write(line + "\n")
