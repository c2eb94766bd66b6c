"""order-v1 written a second time, straight from its definition: lists, fractions and no haste."""

import hashlib
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np

Sample = tuple[int, int]  # (shard, row)


class Shape(NamedTuple):
    """What order-v1 depends on."""

    counts: tuple[int, ...]
    seed: int
    G: int
    L: int
    K: int
    S: int
    tail: str = "carry"


def permuted(items, tag, *numbers):
    text = "order-v1/" + "/".join([tag, *(str(n) for n in numbers)])
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()
    words = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    raw = np.random.Philox(key=np.array(words, np.uint64)).random_raw(len(items))
    by_word = sorted(range(len(items)), key=lambda i: (int(raw[i]), i))
    return [items[i] for i in by_word]


def lane_samples(shape: Shape, epoch: int, lane: int) -> list[Sample]:
    """E(epoch, lane), whole."""
    counts, seed, _, L, K, S, _ = shape
    N = sum(counts)
    shards = [number for number, count in enumerate(counts) if count > 0]
    shards = permuted(shards, "shards", seed, epoch)
    everything = [(shard, row) for shard in shards for row in range(counts[shard])]
    lengths = [-(-(N - x) // L) if x < N else 0 for x in range(L)]
    start = sum(lengths[:lane])
    mine = everything[start : start + lengths[lane]]

    spans: list[list[Sample]] = []
    for sample in mine:
        if spans and spans[-1][0][0] == sample[0]:
            spans[-1].append(sample)
        else:
            spans.append([sample])
    spans = permuted(spans, "lane", seed, epoch, lane)

    sizes = [1 + lane % K] + [K] * len(spans)
    merged: list[Sample] = []
    for start, size in zip(accumulate([0, *sizes]), sizes, strict=False):
        group = spans[start : start + size]
        fractions = [
            (Fraction(2 * i + 1, 2 * len(span)), j, i, span[i])
            for j, span in enumerate(group)
            for i in range(len(span))
        ]
        merged += [entry[3] for entry in sorted(fractions, key=lambda entry: entry[:3])]

    windows = [merged[at : at + S] for at in range(0, len(merged), S)]
    return [
        sample
        for w, window in enumerate(windows)
        for sample in permuted(window, "window", seed, epoch, lane, w)
    ]


class SlowOrder:
    """T -> (epoch, sample, weight), and steps in slot order."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.N = sum(shape.counts)
        batches = {"mask": -(-self.N // shape.G), "drop": self.N // shape.G}
        self.period = shape.G * batches[shape.tail] if shape.tail in batches else self.N
        self._lanes: dict[tuple[int, int], list[Sample]] = {}

    def at(self, T: int) -> tuple[int, Sample, int]:
        epoch, p = divmod(T, self.period)
        weight = 1 if p < self.N else 0
        p %= self.N
        lane, k = p % self.shape.L, p // self.shape.L
        if (epoch, lane) not in self._lanes:
            self._lanes[epoch, lane] = lane_samples(self.shape, epoch, lane)
        return epoch, self._lanes[epoch, lane][k], weight

    def step(self, s: int) -> list[tuple[int, Sample, int]]:
        """Slots 0 .. G - 1 of step s."""
        G, L = self.shape.G, self.shape.L
        c = G // L
        slots: dict[int, tuple[int, Sample, int]] = {}
        for T in range(s * G, (s + 1) * G):
            slots[(T % L) * c + (T % G) // L] = self.at(T)
        return [slots[slot] for slot in range(G)]
