"""An account of every slot that a rank delivered: by epoch, and as a digest of who stood where.

Both add up over ranks: the sum over all ranks does not depend on how many there are.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.reader import ORDINAL_SHIFT
from pipeline.data.stream.batch import BatchBuffer

Words = NDArray[np.uint64]
EPOCH_BITS = 40


def mixed(words: Words) -> Words:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014, fig. 16): every bit depends on all."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def digest_of(step: int, slots: NDArray[np.int64], uids: NDArray[np.int64]) -> int:
    """64 bits that say which samples stood in which slots of a step; add them up modulo 2^64."""
    places = mixed(np.full(len(slots), step, np.uint64)) + mixed(slots.astype(np.uint64))
    return int(mixed(mixed(places) ^ uids.astype(np.uint64)).sum(dtype=np.uint64))


class EpochCount(NamedTuple):
    """Samples of one epoch of one data set that a rank delivered."""

    usable: int = 0
    tombstones: int = 0

    def plus(self, other: "EpochCount") -> "EpochCount":
        """Add two counts."""
        return EpochCount(self.usable + other.usable, self.tombstones + other.tombstones)


class Entry(NamedTuple):
    """One batch, not yet in the books."""

    digest: int
    epochs: dict[tuple[int, int], EpochCount]


class Account:
    """What one stream delivered since it was opened."""

    def __init__(self, first_step: int, first_slot: int, *, ahead: int = 0) -> None:
        """ahead: how many of the batches taken last are not yet used, and so not in the books."""
        self.first_step = first_step
        self.next_step = first_step
        self.digest = 0  # of all steps together, modulo 2^64
        self.last_digest = 0  # of the newest step alone
        self.epochs: dict[tuple[int, int], EpochCount] = {}  # (data set's ordinal, epoch)
        self._first_slot = first_slot
        self._ahead = ahead
        self._waiting: deque[Entry] = deque()

    def add(self, buffer: BatchBuffer) -> None:
        """Take a delivered batch into account, its tombstones buried."""
        self._waiting.append(self._entry(buffer))
        if len(self._waiting) > self._ahead:
            self._book(self._waiting.popleft())

    def settle(self) -> None:
        """Take all batches into account: there are no more."""
        while self._waiting:
            self._book(self._waiting.popleft())

    def _entry(self, buffer: BatchBuffer) -> Entry:
        step = self.next_step + len(self._waiting)
        slots = np.arange(self._first_slot, self._first_slot + len(buffer.uid))
        epochs: dict[tuple[int, int], EpochCount] = {}
        # One number for data set and epoch: most batches hold only one.
        books = (buffer.uid >> ORDINAL_SHIFT << EPOCH_BITS) + buffer.epoch
        for book in np.unique(books).tolist():
            usable = buffer.weight[books == book] > 0
            num_usable = int(np.count_nonzero(usable))
            place = (book >> EPOCH_BITS, book & (1 << EPOCH_BITS) - 1)
            epochs[place] = EpochCount(num_usable, len(usable) - num_usable)
        return Entry(digest_of(step, slots, buffer.uid), epochs)

    def _book(self, entry: Entry) -> None:
        self.last_digest = entry.digest
        self.digest = (self.digest + entry.digest) % 2**64
        self.next_step += 1
        for place, count in entry.epochs.items():
            self.epochs[place] = self.epochs.get(place, EpochCount()).plus(count)
