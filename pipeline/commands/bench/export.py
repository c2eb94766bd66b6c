"""`bench export`: the export beside what decoding and encoding alone reach in as many processes.

decode (ceiling)   pictures in memory decoded into batch buffers, and nothing else
encode (ceiling)   one batch in memory encoded again and again
export             all of it: read, decode, encode, statistics, write, commit, publish

On CPUs decoding and encoding share the cores, so together they cannot do more than
1 / (1 / decode + 1 / encode); where a GPU encodes, than the slower of the two.

parent -> P processes, each with its share of the tasks -> all do the same part at the same time
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection

import numpy as np
import torch

from pipeline.commands.bench.rounds import Rates, interleave, rounds_of, share
from pipeline.common.console import plural, table
from pipeline.common.errors import UserError
from pipeline.data.sequential import ShardRowReader
from pipeline.data.storage import open_storage
from pipeline.data.storage.opening import open_writable
from pipeline.export.layout import ExportDir, new_id
from pipeline.export.plan import ExportPlan
from pipeline.export.prepare import prepare
from pipeline.export.progress import Progress
from pipeline.export.run import WorkerResult, run_worker
from pipeline.export.settings import ExportConfig
from pipeline.export.workers import Worker

DECODE, ENCODE, EXPORT = "decode (ceiling)", "encode (ceiling)", "export"
MAX_HELD_BYTES = 512 << 20  # of pictures in memory, per process


@dataclass(frozen=True)
class ExportBench:
    """Rates in images per second of all processes, medians over the rounds."""

    images_per_round: int
    processes: int
    threads: int  # that decode, in each
    device: str
    rounds: int
    images_per_second: Rates
    bound: float  # what the two ceilings leave
    share_of_bound: float

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        rates = self.images_per_second
        rows = [(name, f"{rate:,.0f}") for name, rate in rates.items()]
        lines = [
            f"{rates[EXPORT]:,.0f} images/s, {share(self.share_of_bound)} of the "
            f"{self.bound:,.0f} that decoding and encoding leave",
            *table(("", "images/s"), rows),
            f"{rounds_of(self.rounds)} of {self.images_per_round:,} images on {self.device}, "
            f"{plural(self.processes, 'process')} of {plural(self.threads, 'thread')} that decode",
        ]
        if self.share_of_bound > 1:
            lines.append("above what the two leave: noise, so take more --rounds")
        return lines


def bench_export(config: ExportConfig, *, processes: int | None, rounds: int) -> ExportBench:
    """Measure an export into a folder beside `config.out`, which is removed in the end.

    Raises UserError when what the config names is not there.
    """
    on_gpu = torch.cuda.is_available()
    if processes is None:
        processes = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    tasks = prepare(config, Worker()).plan.tasks  # raises UserError for a wrong config
    processes = min(processes, len(tasks))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(_WorkerProcess(config, Worker(rank, processes, rank)))
            for rank in range(processes)
        ]
        num_images = sum(remote.answer() for remote in workers)

        def rate_of(part: str) -> Callable[[], float]:
            def run() -> float:
                started = time.perf_counter()
                for remote in workers:
                    remote.ask(part)
                done = sum(remote.answer() for remote in workers)
                return done / (time.perf_counter() - started)

            return run

        rates = interleave({name: rate_of(name) for name in (DECODE, ENCODE, EXPORT)}, rounds)
    both = [1 / rates[DECODE], 1 / rates[ENCODE]]
    bound = 1 / (max(both) if on_gpu else sum(both))
    return ExportBench(
        images_per_round=num_images,
        processes=processes,
        threads=config.data.threads,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        rounds=rounds,
        images_per_second=rates,
        bound=bound,
        share_of_bound=rates[EXPORT] / bound,
    )


class _WorkerProcess:
    """A worker process, as the parent sees it."""

    def __init__(self, config: ExportConfig, worker: Worker) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, worker), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def ask(self, part: str) -> None:
        """Start a part of the work."""
        self._pipe.send(part)

    def answer(self) -> int:
        """Wait for the number of images done; raises UserError if the process has ended."""
        try:
            return self._pipe.recv()
        except EOFError:
            raise UserError("bench export: a process ended; its error is above.") from None


def _serve(pipe: Connection, config: ExportConfig, worker: Worker) -> None:
    bench = _Share(config, worker)
    pipe.send(bench.num_images)
    parts = {DECODE: bench.decode, ENCODE: bench.encode, EXPORT: bench.export}
    try:
        while True:
            parts[pipe.recv()]()
            pipe.send(bench.num_images)
    except EOFError:
        return


class _Share:
    """The tasks of one process, with their images in memory."""

    def __init__(self, config: ExportConfig, worker: Worker) -> None:
        self._out, self._config = config.out, config
        self._prepared = prepare(config, worker)
        self._plan = self._prepared.plan
        self._numbers = count()
        held = 0
        self._contents: list[tuple[ShardRowReader, list[bytes | None]]] = []
        self._tasks = self._plan.tasks[worker.rank :: worker.world]
        data, index, size = self._prepared.data, self._prepared.index, config.batch_size
        with closing(open_storage(data.sources[0].root, data.remote)) as storage:
            for number, task in enumerate(self._tasks):
                reader = ShardRowReader(data, index, task.shard, size, storage)
                for start in range(0, len(reader.rows), size):
                    _, (contents, *_) = reader.read(start)
                    self._contents.append((reader, contents))
                    held += sum(len(content or b"") for content in contents)
                if held > MAX_HELD_BYTES:
                    self._tasks = self._tasks[: number + 1]
                    break
        self.num_images = sum(len(contents) for _, contents in self._contents)

    def decode(self) -> None:
        """Decode all images."""
        with ThreadPoolExecutor(self._prepared.data.threads) as decoders:
            for reader, contents in self._contents:
                reader.decode(contents, decoders)

    def encode(self) -> None:
        """Encode as many batches, of zeros."""
        data = self._prepared.data.decode
        shape = (self._config.batch_size, *data.buffer_shape)
        x = data.event_view(torch.zeros(shape, dtype=getattr(torch, data.stored_dtype.name)))
        encoder, rows = self._prepared.work.encoder, np.arange(self._config.batch_size)
        for _ in self._contents:
            encoder.finish(encoder.start(x), rows)

    def export(self) -> None:
        """Export the tasks to a new directory, and remove it."""
        out = f"{self._out}.bench-{new_id()}"
        export = ExportDir(open_writable(out))
        plan = ExportPlan(self._plan.fingerprint, self._tasks)
        try:
            outcome = run_worker(
                export,
                plan,
                self._prepared.work,
                worker=Worker(),
                should_stop=lambda: False,
                progress=Progress(export, plan, enabled=False),
            )
        finally:
            export.store.delete_folder("")
        assert outcome == WorkerResult(), outcome.errors
