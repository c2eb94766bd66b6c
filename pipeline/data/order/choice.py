"""A choice of a split's samples by a key, from counts alone: `choice-v1`.

    counts [shards], M, key -> M different positions of the split -> (shard, row within the split)

Each sample is chosen with the same probability M / N, and M samples are chosen exactly:

1. The shards lie in a keyed permutation on a circle of N positions.
2. With more than MAX_SHARDS shards only an arc of them is looked at, from a uniform position on:
   A = max(M, N MAX_SHARDS / shards) positions. Each position is in it with probability A / N, and
   tables of about MAX_SHARDS shards have to be read.
3. Of the positions of the arc, M are chosen uniformly: the first M different ones of a keyed
   sequence of uniform positions, or if M > A / 2 all but the first A - M.

The work is that of max(M, shards) numbers. The key is the identity of data set and split, so all
runs on the same data choose the same samples. A change needs a new version name.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.order_v1 import Order, keyed_bits, keyed_permutation

CHOICE_VERSION = "choice-v1"
MAX_SHARDS = 4096

Ints = NDArray[np.int64]


class ChosenOrder(Order):
    """The order of a choice of a split's samples."""

    def __init__(
        self, counts: Ints, max_samples: int, *, dataset_id: str, split: str, **settings: Any
    ) -> None:
        """counts: of the split, per shard; max_samples: fewer than their sum.

        settings: those of `Order`, which raises UserError.
        """
        shard, self._rows = choose(counts, max_samples, f"{dataset_id}/{split}")
        kept = np.bincount(shard, minlength=len(counts))
        self._first = np.cumsum(kept) - kept
        split = f"{split}/{CHOICE_VERSION}/{max_samples}"
        super().__init__(kept, dataset_id=dataset_id, split=split, **settings)

    def window(self, epoch: int, lane: int, window: int) -> tuple[Ints, Ints]:
        """(shard, row within the split's rows of the shard) of each position of one window."""
        shard, number = super().window(epoch, lane, window)
        return shard, self._rows[self._first[shard] + number]


def choose(counts: Ints, num: int, key: str) -> tuple[Ints, Ints]:
    """Choose `num` samples of shards with so many samples; 0 < num < their sum.

    Returns shards and rows [num], ascending.
    """
    tag = f"{CHOICE_VERSION}/{hashlib.sha256(key.encode()).hexdigest()}"
    shards = np.flatnonzero(counts)
    shards = shards[keyed_permutation(len(shards), f"{tag}/shards")]
    ends = np.cumsum(counts[shards])
    total = int(ends[-1])
    arc = min(max(num, -(-total * MAX_SHARDS // len(shards))), total)
    start = int(_different(1, total, f"{tag}/start")[0])
    position = (start + _different_or_rest(num, arc, f"{tag}/positions")) % total
    at = np.searchsorted(ends, position, side="right")
    shard, row = shards[at], position - (ends - counts[shards])[at]
    ascending = np.lexsort((row, shard))
    return shard[ascending], row[ascending]


def _different_or_rest(num: int, below: int, tag: str) -> Ints:
    """`num` different numbers below a bound, uniformly, by whichever side is smaller."""
    if 2 * num <= below:
        return _different(num, below, tag)
    is_chosen = np.ones(below, np.bool_)
    is_chosen[_different(below - num, below, tag)] = False
    return np.flatnonzero(is_chosen)


def _different(num: int, below: int, tag: str) -> Ints:
    """The first `num` different ones of a keyed sequence of numbers, uniform below a bound."""
    bits, sequence = keyed_bits(tag), np.zeros(0, np.int64)
    last = np.uint64((1 << 64) // below * below - 1)  # the words up to it are as many for each
    while True:
        words = bits.random_raw(num + num // 2 + 1)
        drawn = (words[words <= last] % np.uint64(below)).astype(np.int64)
        sequence = np.concatenate([sequence, drawn])
        first = np.sort(np.unique(sequence, return_index=True)[1])
        if len(first) >= num:
            return sequence[first[:num]]
