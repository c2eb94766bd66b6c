"""What a rank delivered: samples per epoch, a digest of which sample filled which slot, counters.

All of them are summed over ranks. The sums of samples and digests do not depend on the number of
ranks.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.reader import ORDINAL_SHIFT
from pipeline.data.stream.batch import BatchBuffer

Words = NDArray[np.uint64]
EPOCH_BITS = 40
MAX_TIMES = 4096  # newest decode times, for percentiles


@dataclass
class StreamCounters:
    """Running totals of one rank."""

    batches: int = 0
    images: int = 0  # slots delivered, tombstones and repeats included
    tombstones: int = 0
    bad_in_row: int = 0  # tombstones at the end of what was delivered
    max_bad_in_row: int = 0
    stall_seconds: float = 0.0  # waiting for data in next()
    num_ready: int = 0  # decoded batches at each call of next(), summed
    bytes_read: int = 0
    bytes_wanted: int = 0  # of the members themselves
    reads: int = 0
    retries: int = 0  # requests to a remote store sent again
    reopened: int = 0  # of these, transfers that continued in the middle
    # Seconds per image, averaged over each chunk of slots that a thread decoded.
    decode_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=MAX_TIMES))


def mixed(words: Words) -> Words:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014, fig. 16): every bit depends on all."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def digest_of(step: int, slots: NDArray[np.int64], uids: NDArray[np.int64]) -> int:
    """A 64-bit digest of which samples filled which slots of a step; sums modulo 2^64."""
    slot_words = mixed(np.full(len(slots), step, np.uint64)) + mixed(slots.astype(np.uint64))
    return int(mixed(mixed(slot_words) ^ uids.astype(np.uint64)).sum(dtype=np.uint64))


class EpochCount(NamedTuple):
    """How many samples of one epoch of one data set a rank delivered."""

    usable: int = 0
    tombstones: int = 0

    def plus(self, other: "EpochCount") -> "EpochCount":
        """Add two counts."""
        return EpochCount(self.usable + other.usable, self.tombstones + other.tombstones)


class BatchEntry(NamedTuple):
    """A delivered batch that is not yet counted."""

    digest: int
    epochs: dict[tuple[int, int], EpochCount]


class Account:
    """What one stream has delivered since it was opened."""

    def __init__(self, first_step: int, first_slot: int, *, ahead: int = 0) -> None:
        """ahead: how many of the newest batches are not yet used, and so not counted."""
        self.first_step = first_step
        self.next_step = first_step
        self.digest = 0  # sum over all steps, modulo 2^64
        self.last_digest = 0  # of the newest step
        self.epochs: dict[tuple[int, int], EpochCount] = {}  # (data set's ordinal, epoch)
        self._first_slot = first_slot
        self._ahead = ahead
        self._waiting: deque[BatchEntry] = deque()

    def add(self, buffer: BatchBuffer) -> None:
        """Count a delivered batch, in which bad samples already have weight 0."""
        self._waiting.append(self._entry(buffer))
        if len(self._waiting) > self._ahead:
            self._book(self._waiting.popleft())

    def settle(self) -> None:
        """Count the remaining batches, at the end of the stream."""
        while self._waiting:
            self._book(self._waiting.popleft())

    def _entry(self, buffer: BatchBuffer) -> BatchEntry:
        step = self.next_step + len(self._waiting)
        slots = np.arange(self._first_slot, self._first_slot + len(buffer.uid))
        epochs: dict[tuple[int, int], EpochCount] = {}
        # One number for data set and epoch: most batches hold only one.
        books = (buffer.uid >> ORDINAL_SHIFT << EPOCH_BITS) + buffer.epoch
        for book in np.unique(books).tolist():
            usable = buffer.weight[books == book] > 0
            num_usable = int(np.count_nonzero(usable))
            epoch_key = (book >> EPOCH_BITS, book & (1 << EPOCH_BITS) - 1)
            epochs[epoch_key] = EpochCount(num_usable, len(usable) - num_usable)
        return BatchEntry(digest_of(step, slots, buffer.uid), epochs)

    def _book(self, entry: BatchEntry) -> None:
        self.last_digest = entry.digest
        self.digest = (self.digest + entry.digest) % 2**64
        self.next_step += 1
        for epoch_key, count in entry.epochs.items():
            self.epochs[epoch_key] = self.epochs.get(epoch_key, EpochCount()).plus(count)
