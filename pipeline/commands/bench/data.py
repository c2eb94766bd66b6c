"""`bench data`: the stream beside the ceilings of its parts, on the same bytes and threads.

read                 the ranges that the stream reads, and nothing else
read + parse         planned, read and cut into members
decode (ceiling)     members in memory decoded into batch buffers
stream               our batches, in steady state
stream + corruption  the same, each batch corrupted on the device as training does
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.commands.bench.rounds import Rates, interleave, rounds_of, share
from pipeline.common.console import in_bytes, plural, table
from pipeline.config import TrainConfig
from pipeline.data.order import Run
from pipeline.data.storage import Storage
from pipeline.data.stream import open_stream
from pipeline.data.stream.batch import new_buffer
from pipeline.data.stream.datasets import DataSets, open_indexes
from pipeline.data.stream.device import DeviceBatches
from pipeline.data.stream.fetch import FetchedSamples
from pipeline.training.build import check_data, make_forward, make_order

# From this share of the ceiling on, decoding is the bottleneck.
AT_THE_CEILING = 0.9

READ, PARSE, DECODE = "read", "read + parse", "decode (ceiling)"
STREAM, CORRUPT = "stream", "stream + corruption"


@dataclass(frozen=True)
class DataBench:
    """Rates in images per second, medians over the rounds, and their shares of the ceiling."""

    images_per_round: int
    bytes_per_image: float
    threads: int
    rounds: int
    images_per_second: Rates
    share_of_ceiling: dict[str, float]
    bottleneck: str

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        rates, shares = self.images_per_second, self.share_of_ceiling
        rows = [(name, f"{rates[name]:,.0f}", share(shares[name])) for name in rates]
        lines = [
            f"{rates[STREAM]:,.0f} images/s from the stream, {share(shares[STREAM])} of what "
            f"decoding alone reaches here; the bottleneck is {self.bottleneck}",
            *table(("", "images/s", "of the ceiling"), rows),
            f"{rounds_of(self.rounds)} of {self.images_per_round:,} images of "
            f"{in_bytes(self.bytes_per_image)}, {plural(self.threads, 'thread')} that decode",
        ]
        if max(shares[READ], shares[PARSE]) > 1:
            lines.append("reading above the ceiling: faster than decoding, so it holds up nothing")
        if shares[STREAM] > 1:
            lines.append("the stream above the ceiling: noise, so take more --rounds or --images")
        return lines


def bench_data(config: TrainConfig, *, num_images: int, rounds: int) -> DataBench:
    """Measure the data path of one process; raises UserError if the data is not there."""
    work = _Work(config, max(num_images // config.batch_size, 1))
    try:
        contenders: dict[str, Callable[[], float]] = {
            READ: work.read,
            PARSE: work.parse,
            DECODE: work.decode,
            STREAM: lambda: work.stream(corrupt=False),
        }
        if config.corruptions:
            contenders[CORRUPT] = lambda: work.stream(corrupt=True)
        rates = interleave(contenders, rounds)
    finally:
        work.close()
    return DataBench(
        images_per_round=work.num_images,
        bytes_per_image=sum(map(len, work.contents)) / max(len(work.contents), 1),
        threads=config.data.threads,
        rounds=rounds,
        images_per_second=rates,
        share_of_ceiling={name: rate / rates[DECODE] for name, rate in rates.items()},
        bottleneck=_bottleneck(rates),
    )


def _bottleneck(rates: Rates) -> str:
    if CORRUPT in rates and rates[CORRUPT] < AT_THE_CEILING * rates[STREAM]:
        return "corruption: it runs on the cores that decode"
    if rates[STREAM] >= AT_THE_CEILING * rates[DECODE]:
        return "decoding: more data.threads on more cores, or smaller stored images"
    if rates[PARSE] < rates[DECODE]:
        return "reading: a faster store, or more data.read_threads"
    return "none of the parts alone: Python that connects them"


class _Work:
    """A few steps of the order: their reads, and their members in memory."""

    def __init__(self, config: TrainConfig, num_steps: int) -> None:
        self._config = config
        indexes = open_indexes(config.data)
        self._states = check_data(config, indexes)
        self._sets = DataSets(config.data, indexes, make_order(config, indexes), self._states)
        self._num_steps = num_steps
        # Steady state begins after the second window of every lane: its memory is then reused.
        windows = (
            2 * min(o.window_size, o.lane_length(0)) * o.lanes for o in self._sets.order.orders
        )
        self._first_step = -(-max(windows) // config.batch_size)
        self._readers = self._sets.num_read_threads or config.data.threads
        self._reads: list[tuple[Storage, str, int, int]] = []
        members: list[tuple[int, bytes, NDArray[np.float32]]] = []
        for source, positions, samples in self._fetch():
            index, storage = self._sets.indexes[source], self._sets.storages[source]
            self._reads += [
                (storage, index.shards[read.shard].name, read.offset, read.num_bytes)
                for read in samples.reads
            ]
            step, slot = self._sets.order.slots(source, positions)
            position = step * config.batch_size + slot
            columns = (
                position.tolist(),
                samples.read_buffers,
                samples.start,
                samples.stop,
                samples.draws,
            )
            for where, slab, start, stop, draws in zip(*columns, strict=True):
                if slab is not None:
                    members.append((where, bytes(slab.memory[start:stop]), draws))
        # In the order of the slots, as the stream decodes: neighbours come from all over memory.
        members.sort(key=lambda member: member[0])
        self.contents = [content for _, content, _ in members]
        self._draws = [draws for _, _, draws in members]

    @property
    def num_images(self) -> int:
        """Images of one round."""
        return self._num_steps * self._config.batch_size

    def _runs(self) -> Iterator[tuple[int, Run, NDArray[np.int64]]]:
        """(data set, run, its positions in the data set's stream) of the stretch."""
        first, stop = self._first_step, self._first_step + self._num_steps
        for source, order in enumerate(self._sets.order.orders):
            for lane in range(order.lanes):
                turn = self._sets.order.first_turn(source, lane, first)
                end = self._sets.order.first_turn(source, lane, stop)
                while turn < end:
                    run = order.run_at(lane, turn)
                    turns = np.arange(turn, min(run.next_turn, end))
                    turn = run.next_turn
                    yield source, run, turns * order.lanes + lane

    def _fetch(self) -> list[tuple[int, NDArray[np.int64], FetchedSamples]]:
        def fetch(
            item: tuple[int, Run, NDArray[np.int64]],
        ) -> tuple[int, NDArray[np.int64], FetchedSamples]:
            source, run, positions = item
            in_window = run.start + np.arange(len(positions))
            return source, positions, self._sets.fetchers[source].fetch(run, in_window)

        with ThreadPoolExecutor(self._readers) as pool:
            return list(pool.map(fetch, self._runs()))

    def read(self) -> float:
        """Read the ranges alone."""

        def read(item: tuple[Storage, str, int, int]) -> None:
            storage, name, offset, num_bytes = item
            storage.read(name, offset, num_bytes)

        def work() -> None:
            with ThreadPoolExecutor(self._readers) as pool:
                for _ in pool.map(read, self._reads):
                    pass

        return self._rate(work)

    def parse(self) -> float:
        """Plan, read and cut."""
        return self._rate(self._fetch)

    def decode(self) -> float:
        """Decode the members from memory into buffers like the stream's, in its threads."""
        data, size = self._config.data, self._config.batch_size
        decode_slot = self._sets.slot_decoder()
        contents, draws = self.contents, self._draws

        def decode(thread: int) -> None:
            buffer = new_buffer(data.decode, size, self._sets.names.keys, pin=False)
            buffer.draws = np.zeros((size, self._sets.augmenter.num_draws), np.float32)
            for number in range(thread, len(contents), data.threads):
                slot = number % size
                buffer.draws[slot] = draws[number]
                decode_slot(buffer, slot, contents[number])

        def work() -> None:
            with ThreadPoolExecutor(data.threads) as pool:
                for _ in pool.map(decode, range(data.threads)):
                    pass

        return self._rate(work)

    def stream(self, *, corrupt: bool) -> float:
        """Take the stretch's batches from a stream that has got going."""
        config = self._config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        forward = make_forward(config, device)
        with open_stream(
            config.data, self._sets.indexes, self._sets.order, self._states, device=device
        ) as stream:
            batches = DeviceBatches(stream, device)

            def take(num_steps: int) -> None:
                for _ in range(num_steps):
                    batch = next(batches)
                    if corrupt:
                        forward.inputs(batch, "train")
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            take(self._first_step)
            return self._rate(lambda: take(self._num_steps))

    def close(self) -> None:
        """Give back what is held open."""
        self._sets.close()

    def _rate(self, work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return self.num_images / (time.perf_counter() - started)
