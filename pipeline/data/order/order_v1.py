"""Which sample fills which slot: `order-v1`, a pure function of (counts, seed, G, L, K, S).

    T (position in the endless stream) -> epoch e, lane, index k -> E(e, lane)[k] = (shard, row)
    step s = T in [s G, (s + 1) G) -> slots -> ranks

The shards of an epoch are permuted and cut into L lanes of equal length. A lane reads K spans of
shards at a time, each strictly forward, and merges them evenly; then windows of S positions are
permuted. Every sample comes once per epoch; the result does not depend on ranks, threads and
restarts. Only requested windows are planned: no array here grows with the number of samples. The
function is frozen: a change needs a new version name, because the data state of a run is
{T, order_id, dataset_id}. docs/order.md explains the words and draws an example.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.files import canonical_json

ORDER_VERSION = "order-v1"
MAX_DEFAULT_LANES = 64
# Merge fractions (2i+1)/(2q) of two spans differ by >= 1/(4 q q'), which float64 still resolves
# below this q; equal fractions divide to equal floats. So a float sort is exact.
MAX_SHARD_SAMPLES = 1 << 25

Tail = Literal["carry", "mask", "drop"]
Ints = NDArray[np.int64]


def keyed_bits(tag: str, *numbers: int) -> np.random.Philox:
    """Return the generator of raw bits whose key is a tag and numbers."""
    text = "/".join((ORDER_VERSION, tag, *map(str, numbers)))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8"))


def keyed_permutation(length: int, tag: str, *numbers: int) -> Ints:
    """Return a permutation p of `length` positions, used as output[i] = input[p[i]].

    A stable argsort of raw Philox words: numpy freezes those, but not `Generator.permutation`.
    """
    words = keyed_bits(tag, *numbers).random_raw(length)
    return np.argsort(words, kind="stable")


def default_lanes(batch_size: int) -> int:
    """The largest divisor of the global batch that is at most 64."""
    return max(d for d in range(1, MAX_DEFAULT_LANES + 1) if batch_size % d == 0)


@dataclass(frozen=True)
class LanePositions:
    """Epoch, lane and index in the lane of stream positions; `repeated` = weight 0."""

    epoch: Ints
    lane: Ints
    index: Ints
    repeated: NDArray[np.bool_]


@dataclass(frozen=True)
class Run:
    """Consecutive turns of one lane slot that read one window: [start, stop) within it.

    Turn n of lane slot x is stream position T = n L + x; a Run covers turns from `turn` on.
    """

    epoch: int
    lane: int
    window: int
    start: int
    stop: int
    turn: int
    repeated: bool

    @property
    def next_turn(self) -> int:
        """The first turn after this run."""
        return self.turn + self.stop - self.start


@dataclass(frozen=True)
class LaneSpans:
    """One lane of one epoch: spans in reading order, and the groups that merge them."""

    shard: Ints
    low: Ints
    length: Ints
    group: Ints  # of each span
    group_first: Ints  # first span of each group, and the number of spans at the end
    group_start: Ints  # first position of each group, and the lane's length at the end


class Order:
    """The order of one split of one data set under one seed."""

    def __init__(
        self,
        counts: Sequence[int] | Ints,
        *,
        seed: int,
        batch_size: int,
        lanes: int | None = None,
        interleave: int = 8,
        window: int = 256,
        tail: Tail = "carry",
        dataset_id: str = "",
        split: str = "all",
    ) -> None:
        """Take the counts per shard (in order of shard name); raise UserError on bad numbers.

        `dataset_id` and `split` only affect the identity.
        """
        all_counts = np.asarray(counts, np.int64)
        self.shard_ids: Ints = np.flatnonzero(all_counts)
        self.counts: Ints = all_counts[self.shard_ids]
        self.num_samples = int(self.counts.sum())
        self.seed = seed
        self.batch_size = batch_size
        self.lanes = default_lanes(batch_size) if lanes is None else lanes
        self.interleave = interleave
        self.window_size = window
        self.tail: Tail = tail
        self.dataset_id = dataset_id
        self.split = split
        self._check()
        # N': positions per epoch; `mask` includes repeats, `drop` excludes the incomplete batch.
        self.epoch_length = {
            "carry": self.num_samples,
            "mask": -(-self.num_samples // batch_size) * batch_size,
            "drop": self.num_samples // batch_size * batch_size,
        }[tail]
        self._shards_of_epoch = lru_cache(maxsize=4)(self._plan_epoch)
        self.spans_of_lane = lru_cache(maxsize=4 * self.lanes)(self._plan_lane)

    def _check(self) -> None:
        if self.batch_size % self.lanes:
            divisors = [d for d in range(1, 129) if self.batch_size % d == 0]
            raise UserError(
                f"data.lanes = {self.lanes} does not divide the global batch of {self.batch_size}: "
                f"choose one of {divisors} or leave it out."
            )
        if self.num_samples == 0:
            raise UserError("The chosen split holds no samples: check data.split and the index.")
        if self.tail == "drop" and self.num_samples < self.batch_size:
            raise UserError(
                f"With the tail `drop` no batch is left: the split holds {self.num_samples} "
                f"samples, a global batch {self.batch_size}."
            )
        if int(self.counts.max()) >= MAX_SHARD_SAMPLES:
            raise UserError(
                f"A shard holds {int(self.counts.max())} samples; order-v1 takes fewer than "
                f"{MAX_SHARD_SAMPLES}: pack it into smaller shards."
            )

    @property
    def order_id(self) -> str:
        """Hex identity of T -> sample: equal ids mean equal samples at every T, for any G."""
        parts = [self.dataset_id, self.split, ORDER_VERSION]
        numbers = [self.seed, self.lanes, self.interleave, self.window_size]
        return hashlib.sha256(canonical_json([*parts, *numbers])).hexdigest()

    @property
    def lane_share(self) -> int:
        """c = G / L: slots of a global batch that belong to one lane slot."""
        return self.batch_size // self.lanes

    def lane_length(self, lane: int) -> int:
        """Samples of a lane in one epoch: ceil((N - lane) / L)."""
        return max(0, -(-(self.num_samples - lane) // self.lanes))

    def positions(self, step: int, *, rank: int = 0, world: int = 1) -> Ints:
        """Stream positions T of the slots that `rank` of `world` owns at `step`, in slot order."""
        slots_per_rank = self.batch_size // world
        slots = np.arange(rank * slots_per_rank, (rank + 1) * slots_per_rank)
        return (
            step * self.batch_size
            + (slots % self.lane_share) * self.lanes
            + slots // self.lane_share
        )

    def lane_positions(self, positions: Ints) -> LanePositions:
        """Epoch, lane and index of stream positions."""
        epoch, offset = np.divmod(positions, self.epoch_length)
        repeated = offset >= self.num_samples
        offset = offset % self.num_samples
        return LanePositions(epoch, offset % self.lanes, offset // self.lanes, repeated)

    def run_at(self, lane_slot: int, turn: int) -> Run:
        """The run of consecutive turns of a lane slot that starts at `turn`."""
        epoch, offset = divmod(turn * self.lanes + lane_slot, self.epoch_length)
        index, lane = divmod(offset % self.num_samples, self.lanes)
        window, start = divmod(index, self.window_size)
        in_window = min((window + 1) * self.window_size, self.lane_length(lane)) - index
        in_epoch = -(-(self.epoch_length - offset) // self.lanes)
        length = min(in_window, in_epoch)
        repeated = offset >= self.num_samples
        return Run(epoch, lane, window, start, start + length, turn, repeated)

    def samples(self, positions: Ints) -> tuple[Ints, Ints]:
        """(shard, row within the split's rows of the shard) at any number of stream positions."""
        located = self.lane_positions(positions)
        shard, row = np.empty_like(positions), np.empty_like(positions)
        wanted = np.stack([located.epoch, located.lane, located.index // self.window_size])
        windows, which = np.unique(wanted, axis=1, return_inverse=True)
        for number, (epoch, lane, window) in enumerate(windows.T.tolist()):
            chosen = which.reshape(-1) == number
            at = located.index[chosen] % self.window_size
            shards, rows = self.window(epoch, lane, window)
            shard[chosen], row[chosen] = shards[at], rows[at]
        return shard, row

    def window(self, epoch: int, lane: int, window: int) -> tuple[Ints, Ints]:
        """(shard, row within the split's rows of the shard) of each position of one window.

        Shards are numbered as in `counts`, empty ones included.
        """
        spans = self.spans_of_lane(epoch, lane)
        start = window * self.window_size
        stop = min(start + self.window_size, int(spans.group_start[-1]))
        shard, row = _merge(spans, start, stop, margin=self.interleave)
        shuffle = keyed_permutation(stop - start, "window", self.seed, epoch, lane, window)
        return self.shard_ids[shard[shuffle]], row[shuffle]

    def _plan_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's shards in order, and where each ends among all samples."""
        shards = keyed_permutation(len(self.counts), "shards", self.seed, epoch)
        return shards, np.cumsum(self.counts[shards])

    def _plan_lane(self, epoch: int, lane: int) -> LaneSpans:
        shards, ends = self._shards_of_epoch(epoch)
        quotient, remainder = divmod(self.num_samples, self.lanes)
        start = lane * quotient + min(lane, remainder)
        stop = start + self.lane_length(lane)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left")) + 1 if stop > start else first
        ids, span_ends = shards[first:last], ends[first:last]
        span_starts = span_ends - self.counts[ids]
        low = np.maximum(start - span_starts, 0)
        length = np.minimum(span_ends, stop) - span_starts - low
        shuffle = keyed_permutation(len(ids), "lane", self.seed, epoch, lane)
        return self._group(ids[shuffle], low[shuffle], length[shuffle], 1 + lane % self.interleave)

    def _group(self, shard: Ints, low: Ints, length: Ints, first_group: int) -> LaneSpans:
        numbers = np.arange(len(shard))
        group = np.maximum(numbers - first_group + self.interleave, 0) // self.interleave
        group_first = np.flatnonzero(np.diff(group, prepend=-1))
        group_first = np.append(group_first, len(shard))
        group_start = np.concatenate([[0], np.cumsum(length)])[group_first]
        return LaneSpans(shard, low, length, group, group_first, group_start)


def _merge(spans: LaneSpans, start: int, stop: int, *, margin: int) -> tuple[Ints, Ints]:
    """(shard, row) at the merged positions [start, stop) of a lane, before the window's shuffle.

    Sample i of a span with q samples has the fraction (2i+1)/(2q); a group is sorted by fraction,
    ties by span. Below any fraction t lie t q +- 1/2 samples of a span, so t Q +- margin/2 of a
    group with Q samples and at most `margin` spans: only the samples with fractions in
    ((start - margin)/Q, (stop + margin)/Q) need sorting, the number before them is exact.
    """
    first_group = int(np.searchsorted(spans.group_start, start, side="right")) - 1
    end_group = int(np.searchsorted(spans.group_start, stop, side="left"))
    first_span = int(spans.group_first[first_group])
    chosen = slice(first_span, int(spans.group_first[end_group]))
    length, group = spans.length[chosen], spans.group[chosen]
    group_start = spans.group_start[group]
    total = spans.group_start[group + 1] - group_start
    low = _num_below(_clipped(start - margin - group_start, total), length, total)
    high = _num_below(_clipped(stop + margin - group_start, total), length, total)

    num = high - low
    span = np.repeat(np.arange(len(length)), num)
    before = np.cumsum(num) - num
    sample = np.arange(len(span)) + (low - before)[span]
    fraction = (2 * sample + 1) / (2 * length[span])
    merged = np.lexsort((fraction, group[span]))  # stable: ties stay in order of span
    base = int(spans.group_start[first_group]) + int(low.sum())  # only the first group has low > 0
    merged = merged[start - base : stop - base]
    span, sample = span[merged], sample[merged]
    return spans.shard[chosen][span], spans.low[chosen][span] + sample


def _num_below(cut: Ints, length: Ints, total: Ints) -> Ints:
    """How many samples of each span have (2i+1)/(2 length) < cut/total; exact in integers."""
    return _clipped(-((total - 2 * cut * length) // (2 * total)), length)


def _clipped(values: Ints, high: Ints) -> Ints:
    """Clip `values` to [0, high], in a third of the time of np.clip, which checks types first."""
    return np.minimum(np.maximum(values, 0), high)
