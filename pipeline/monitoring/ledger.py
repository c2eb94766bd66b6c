"""Metrics of the data stream: a count of every sample, and the cost of transfers.

    each rank's Account and counters --all ranks--> sums -> checks -> values by metric name

Names (prefix `data/`), all since the last log unless said otherwise:
    order_digest             52-bit digest of which sample was in which slot: equal for any number
                             of processes and threads, and after restarts, if the same steps are
                             logged
    ready_batches            decoded batches that were ready when one was asked for, as a fraction
                             of `data.prefetch`
    bytes_per_second         read from the store, by all processes
    read_amplification       bytes read / bytes of the members that were needed (since the start)
    retries, reopened        requests sent again; those in the middle of a range (since the start)
    decode_ms_p50, _p95      milliseconds per image in one decoding thread, of this process
    ledger/...               when an epoch of a data set is complete: epoch, samples in the data
                             set, usable, tombstones, and carried: delivered by an earlier start of
                             the run
"""

import time
from collections.abc import Sequence

import numpy as np

from pipeline.data.index import Index
from pipeline.data.order.mixture import Mixture
from pipeline.data.stream import Stream
from pipeline.data.stream.account import EpochCount, digest_of
from pipeline.distributed.runtime import Runtime

DIGEST_BITS = 52  # JSON's float64 holds 53 bits exactly


class Ledger:
    """Counts the samples of one training stream, over all processes."""

    def __init__(
        self,
        stream: Stream,
        indexes: Sequence[Index],
        *,
        split: str,
        prefetch: int,
        runtime: Runtime,
    ) -> None:
        self._stream = stream
        self._indexes = indexes
        self._split = split
        self._prefetch = prefetch
        self._runtime = runtime
        self._closed: set[tuple[int, int]] = set()
        self._last = (time.monotonic(), 0, 0, 0)  # time, digest, bytes, batches
        self._num_ready = 0

    def read(self) -> dict[str, float]:
        """Return the values since the last call; a collective.

        Raises RuntimeError, on every process, if a complete epoch lacks a sample.
        """
        account, counters = self._stream.account, self._stream.counters
        mine = (account.digest, account.epochs, counters.bytes_read, counters.bytes_wanted)
        mine += (counters.retries, counters.reopened)
        digests, epochs, read, wanted, retries, reopened = zip(
            *self._runtime.gather(mine), strict=True
        )
        now, digest = time.monotonic(), sum(digests) % 2**64
        last_time, last_digest, last_bytes, last_batches = self._last
        batches = max(counters.batches - last_batches, 1)
        values = {
            "data/order_digest": (digest - last_digest) % 2**DIGEST_BITS,
            "data/ready_batches": (counters.num_ready - self._num_ready) / batches / self._prefetch,
            "data/bytes_per_second": (sum(read) - last_bytes) / max(now - last_time, 1e-9),
            "data/read_amplification": sum(read) / max(sum(wanted), 1),
            "data/retries": sum(retries),
            "data/reopened": sum(reopened),
        }
        self._last = (now, digest, sum(read), counters.batches)
        self._num_ready = counters.num_ready
        if counters.decode_seconds:
            median, high = np.percentile(list(counters.decode_seconds), (50, 95)) * 1e3
            values |= {"data/decode_ms_p50": float(median), "data/decode_ms_p95": float(high)}
        return values | self._close_epochs(epochs)

    def check_against_plan(self) -> None:
        """Compare the newest step's samples, of all processes, with the order; a collective.

        Raises RuntimeError, on every process, if they differ.
        """
        account = self._stream.account
        step = account.next_step - 1
        if step < account.first_step:
            return
        delivered = sum(self._runtime.gather(account.last_digest)) % 2**64
        planned = delivered
        if self._runtime.is_main:
            planned = planned_digest(self._stream.order, self._indexes, self._split, step)
        if self._runtime.any(planned != delivered):
            raise RuntimeError(
                f"step {step}: the samples that the {self._runtime.world} processes delivered are "
                "not those of the order: they do not read the same data with the same settings"
            )

    def _close_epochs(
        self, epochs: Sequence[dict[tuple[int, int], EpochCount]]
    ) -> dict[str, float]:
        """Return the counts of the epochs that are complete now; check their sums."""
        order, account = self._stream.order, self._stream.account
        values: dict[str, float] = {}
        for source, index in enumerate(self._indexes):
            num = order.orders[source].num_samples
            start = order.start_of(source, account.first_step)
            stop = order.start_of(source, account.next_step)
            for epoch in range(start // num, stop // num):
                key = (index.ordinal, epoch)
                if key in self._closed:
                    continue
                self._closed.add(key)
                total = EpochCount()
                for part in epochs:
                    total = total.plus(part.get(key, EpochCount()))
                account.epochs.pop(key, None)  # the epoch is complete
                carried = max(start - epoch * num, 0)
                if total.usable + total.tombstones + carried != num:
                    raise RuntimeError(
                        f"the counts of epoch {epoch} of {index.path} do not add up: "
                        f"{total.usable} usable samples, {total.tombstones} tombstones and "
                        f"{carried} carried from an earlier start are not its {num} samples"
                    )
                prefix = "data/ledger/" if len(self._indexes) == 1 else f"data/ledger/{source}/"
                values[f"{prefix}epoch"] = epoch
                values[f"{prefix}samples"] = num
                values[f"{prefix}usable"] = total.usable
                values[f"{prefix}tombstones"] = total.tombstones
                values[f"{prefix}carried"] = carried
        return values


def planned_digest(order: Mixture, indexes: Sequence[Index], split: str, step: int) -> int:
    """Return the digest of a whole step that follows from the order."""
    source, shard, row = order.samples(step)
    uids = np.empty(order.batch_size, np.int64)
    for number, index in enumerate(indexes):
        for one in np.unique(shard[source == number]).tolist():
            chosen = np.flatnonzero((source == number) & (shard == one))
            rows = index.table(one).rows_of(index.split_number(split))[row[chosen]]
            uids[chosen] = index.first_uids[one] + rows
    return digest_of(step, np.arange(order.batch_size), uids)
