"""Progress of a long pass over shards, in one line: shards done, share, speed, time left."""

import time
from collections.abc import Callable

# Shows a line; whether it is the last one of its pass, which is never left out.
Progress = Callable[[str, bool], None]


class ProgressTracker:
    """Count finished shards and call `progress`, if given, with a line after each."""

    def __init__(
        self, verb: str, num_shards: int, num_bytes: int, progress: Progress | None
    ) -> None:
        self._verb = verb
        self._num_shards = num_shards
        self._num_bytes = num_bytes
        self._progress = progress
        self._started = time.monotonic()
        self._shards_done = 0
        self._bytes_done = 0
        self._bytes_read = 0

    def add(self, num_bytes: int, *, is_read: bool = True) -> None:
        """Count a finished shard of `num_bytes`; `is_read`: False if it did not have to be read."""
        self._shards_done += 1
        self._bytes_done += num_bytes
        self._bytes_read += num_bytes if is_read else 0
        if self._progress is not None:
            self._progress(self._line(), self._shards_done == self._num_shards)

    def _line(self) -> str:
        share = self._shards_done / self._num_shards
        if self._num_bytes:
            share = min(share, self._bytes_done / self._num_bytes)
        done = f"{self._verb}: {self._shards_done:,} of {self._num_shards:,} shards"
        done += f" ({int(100 * share)} %)"
        seconds = time.monotonic() - self._started
        if self._bytes_read == 0 or seconds <= 0:
            return done
        speed = self._bytes_read / seconds
        done += f", {speed / 1e6:.1f} MB/s"
        if self._shards_done == self._num_shards:
            return done
        return f"{done}, {_duration((self._num_bytes - self._bytes_done) / speed)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
