"""An account of every slot that a rank delivered: by epoch, and as a digest of who stood where.

Both add up over ranks: the sum over all ranks does not depend on how many there are.
"""

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


class Account:
    """What one stream delivered since it was opened."""

    def __init__(self, first_step: int, first_slot: int) -> None:
        self.first_step = first_step
        self.next_step = first_step
        self.digest = 0  # of all steps together, modulo 2^64
        self.last_digest = 0  # of the newest step alone
        self.epochs: dict[tuple[int, int], EpochCount] = {}  # (data set's ordinal, epoch)
        self._first_slot = first_slot

    def add(self, buffer: BatchBuffer) -> None:
        """Take a delivered batch into account, its tombstones buried."""
        slots = np.arange(self._first_slot, self._first_slot + len(buffer.uid))
        self.last_digest = digest_of(self.next_step, slots, buffer.uid)
        self.digest = (self.digest + self.last_digest) % 2**64
        self.next_step += 1
        # One number for data set and epoch: most batches hold only one.
        books = (buffer.uid >> ORDINAL_SHIFT << EPOCH_BITS) + buffer.epoch
        for book in np.unique(books).tolist():
            usable = buffer.weight[books == book] > 0
            num_usable = int(np.count_nonzero(usable))
            place = (book >> EPOCH_BITS, book & (1 << EPOCH_BITS) - 1)
            known = self.epochs.get(place, EpochCount())
            self.epochs[place] = known.plus(EpochCount(num_usable, len(usable) - num_usable))
