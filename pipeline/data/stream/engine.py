"""The threads behind a stream: some fetch, some decode, the consumer waits.

    requests -> [read threads] -> ring -> (step complete, buffer free) -> chunks of slots
             -> [decode threads] -> buffer complete -> `take`

Results never depend on which thread computes them: the order assigns every sample its cell and its
slot. An exception in any thread ends the stream: `take` raises it. The engine holds no reference to
the Stream object, so the threads also stop when a stream is dropped without being closed.
"""

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from pipeline.data.decode import Content, DecodeError, missing_member
from pipeline.data.stream.account import StreamCounters
from pipeline.data.stream.batch import BatchBuffer, Fault
from pipeline.data.stream.fetch import Fetcher
from pipeline.data.stream.sample_ring import FetchRequest, SampleRing

MAX_CHUNK_SLOTS = 64
ALIVE_CHECK_SECONDS = 2.0

Task = tuple[Callable[..., None], tuple[Any, ...]]  # what to call, and its arguments
Queue = SimpleQueue[Task | None]
# Decodes slot n of a buffer from the member's bytes; raises DecodeError.
DecodeSlot = Callable[[BatchBuffer, int, Content], None]


class Engine:
    """Fetch and decode ahead of one consumer."""

    def __init__(
        self,
        ring: SampleRing,
        fetchers: Sequence[Fetcher],
        decode_slot: DecodeSlot,
        buffers: Sequence[BatchBuffer],
        *,
        decode_threads: int,
        read_threads: int,
    ) -> None:
        """`fetchers`: one per data set. The consumer holds one of `buffers`; the others are being
        filled or wait. `read_threads`: 0 = the decode threads fetch, too, so that fewer threads
        compete for the GIL.
        """
        self.counters = StreamCounters()
        self._ring = ring
        self._fetchers = fetchers
        self._decode_slot = decode_slot
        per_thread = -(-ring.num_slots // (2 * decode_threads))
        self._chunk_slots = min(MAX_CHUNK_SLOTS, per_thread)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_stopped = False
        self._free = list(buffers)
        self._prefetch = len(buffers) - 1
        self._ahead: deque[BatchBuffer] = deque()
        self._lent: BatchBuffer | None = None
        self._decode_queue: Queue = SimpleQueue()
        self._read_queue: Queue = SimpleQueue() if read_threads else self._decode_queue
        self._threads = [
            *self._new_threads(read_threads, "read", self._read_queue),
            *self._new_threads(decode_threads, "decode", self._decode_queue),
        ]

    def start(self) -> None:
        """Request the first windows and start the threads."""
        with self._changed:
            self._advance()
        for thread in self._threads:
            thread.start()

    def take(self) -> BatchBuffer | None:
        """Wait for the next batch; None at the end. The batch taken before becomes invalid."""
        started = time.perf_counter()
        with self._changed:
            if self._lent is not None:
                self._free.append(self._lent)
                self._lent = None
            self._advance()
            num_ready = sum(buffer.num_chunks_left == 0 for buffer in self._ahead)
            self.counters.num_ready += min(num_ready, self._prefetch)
            while self._is_stopped or not self._is_next_complete():
                if self._error is not None:
                    raise self._error
                if self._is_stopped or (not self._ahead and self._ring.is_done):
                    return None
                if not self._changed.wait(ALIVE_CHECK_SECONDS):
                    self._check_alive()
            self._lent = self._ahead.popleft()
            self.counters.stall_seconds += time.perf_counter() - started
            self.counters.batches += 1
            self.counters.images += self._ring.num_slots
            return self._lent

    def stop(self) -> None:
        """End all threads and wait for them; unfinished work is dropped."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        for queue in (self._read_queue, self._decode_queue):
            for _ in self._threads:
                queue.put(None)
        for thread in self._threads:
            if thread.ident is not None:  # stopped before it was started
                thread.join()

    def owns_current_thread(self) -> bool:
        """Whether the caller runs in a thread of the engine, where `stop` would deadlock."""
        return threading.current_thread() in self._threads

    def _new_threads(self, count: int, name: str, queue: Queue) -> list[threading.Thread]:
        def loop() -> None:
            try:
                while (task := queue.get()) is not None and not self._is_stopped:
                    work, arguments = task
                    work(*arguments)
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
                self._fail(error)

        # Daemon threads: a stream that is never closed must not block the interpreter's exit.
        return [
            threading.Thread(target=loop, name=f"stream-{name}-{i}", daemon=True)
            for i in range(count)
        ]

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _check_alive(self) -> None:
        for thread in self._threads:
            if not thread.is_alive() and not self._is_stopped:
                raise RuntimeError(f"the thread {thread.name} of the data stream has died")

    def _is_next_complete(self) -> bool:
        return bool(self._ahead) and self._ahead[0].num_chunks_left == 0

    def _advance(self) -> None:
        """Move complete steps to free buffers and request more; the caller holds the lock."""
        while self._free and self._ring.is_ready:
            buffer = self._free.pop()
            self._ring.take(buffer)
            buffer.faults.clear()
            starts = range(0, self._ring.num_slots, self._chunk_slots)
            buffer.num_chunks_left = len(starts)
            self._ahead.append(buffer)
            for start in starts:
                stop = min(start + self._chunk_slots, self._ring.num_slots)
                self._decode_queue.put((self._decode_chunk, (buffer, start, stop)))
        for request in self._ring.requests():
            self._read_queue.put((self._fetch, (request,)))

    def _fetch(self, request: FetchRequest) -> None:
        positions, cells = self._ring.cells_of(request)
        if len(positions) == 0:
            return
        samples = self._fetchers[request.source].fetch(request.run, positions)
        self._ring.fill(request.run, cells, samples)
        with self._changed:
            self.counters.reads += len(samples.reads)
            self.counters.bytes_read += samples.num_bytes_read
            self.counters.bytes_wanted += samples.num_bytes_wanted
            self._ring.arrived(cells)
            self._advance()

    def _decode_chunk(self, buffer: BatchBuffer, start: int, stop: int) -> None:
        # This loop holds the GIL except while decoding: it does as little as possible per sample.
        decode_slot, chunk = self._decode_slot, slice(start, stop)
        columns = (buffer.read_buffers, buffer.starts, buffer.stops, buffer.crc32)
        samples = zip(range(start, stop), *(column[chunk] for column in columns), strict=True)
        began = time.perf_counter()
        for slot, read_buffer, first, end, crc32 in samples:
            try:
                if read_buffer is None:
                    raise missing_member()
                content = read_buffer.memory[first:end]
                if crc32 >= 0:
                    check_crc32(content, crc32)
                decode_slot(buffer, slot, content)
            except DecodeError as error:
                buffer.faults.append(Fault(slot, error.stage, error.reason))
        seconds = time.perf_counter() - began
        buffer.read_buffers[chunk] = [None] * (stop - start)
        with self._changed:
            self.counters.decode_seconds.append(seconds / (stop - start))
            buffer.num_chunks_left -= 1
            if buffer.num_chunks_left == 0:
                self._changed.notify_all()


def check_crc32(content: Content, expected: int) -> None:
    """Raise DecodeError unless the content has the CRC-32 that the index holds."""
    found = zlib.crc32(content)
    if found != expected:
        raise DecodeError("checksum", f"CRC-32 {found:08x}, but {expected:08x} was indexed")
