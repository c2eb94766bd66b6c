"""A pool of reused memory for reads.

    take -> ReadBuffer -> samples of a window refer to it -> the last reference ends -> free again

Fresh memory costs more than the read itself: the kernel zeroes it page by page. Sizes are rounded
up (above 32 KiB by at most an eighth), and a read takes the smallest free buffer that holds it and
is at most half as large again. The pool never holds more than was in use at once: beyond that, free
buffers are released.
"""

from collections import deque
from threading import Lock

SMALLEST = 1 << 12


class ReadBuffer:
    """Memory of one read, at least of the requested size."""

    __slots__ = ("_home", "memory")

    def __init__(self, memory: bytearray, home: deque[bytearray]) -> None:
        self.memory = memory
        self._home = home

    def __del__(self) -> None:
        self._home.append(self.memory)


def rounded_size(num_bytes: int) -> int:
    """The next of eight sizes per power of two."""
    step = max(SMALLEST, (1 << num_bytes.bit_length()) >> 4)
    return max(-(-num_bytes // step), 1) * step


class ReadBufferPool:
    """The read buffers of one stream; thread-safe."""

    def __init__(self) -> None:
        self._free: dict[int, deque[bytearray]] = {}
        self._allocated = 0
        self._most_used = 0
        self._lock = Lock()

    def take(self, num_bytes: int) -> ReadBuffer:
        """Return a buffer of at least `num_bytes`; its content is arbitrary."""
        wanted = rounded_size(num_bytes)
        with self._lock:
            fitting = (n for n, free in self._free.items() if free and wanted <= n <= 1.5 * wanted)
            size = min(fitting, default=wanted)
            home = self._free.setdefault(size, deque())
            memory = home.pop() if home else self._new(size)
        return ReadBuffer(memory, home)

    def _new(self, size: int) -> bytearray:
        """Allocate; release free buffers of other sizes beyond the most that was ever in use."""
        self._allocated += size
        free = sum(other * len(buffers) for other, buffers in self._free.items())
        self._most_used = max(self._most_used, self._allocated - free)
        for other in sorted(self._free, reverse=True):
            while self._allocated > self._most_used and self._free[other]:
                self._free[other].pop()
                self._allocated -= other
        return bytearray(size)
