"""The ceiling: threads that only decode the same bytes, already in memory."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from benchmarks.rivals.loader import Batch, Task, files_of, serve


class _InMemory:
    def __init__(self, task: Task) -> None:
        self._data = [path.read_bytes() for path in files_of(task)]
        self._pool = ThreadPoolExecutor(task.workers)
        self._parts = [self._data[number :: task.workers] for number in range(task.workers)]
        shape = (task.batch_size, task.size, task.size, 3)
        self._slots = [np.empty(shape, np.uint8) for _ in self._parts]

    def epoch(self, number: int) -> Iterator[Batch]:  # noqa: ARG002 - all epochs are alike
        for _ in self._pool.map(self._decode, self._parts, self._slots):
            pass
        yield torch.arange(len(self._data)), torch.from_numpy(self._slots[0])

    def _decode(self, part: Sequence[bytes], slots: np.ndarray) -> None:
        for number, data in enumerate(part):
            simplejpeg.decode_jpeg(data, "RGB", buffer=slots[number % len(slots)])

    def state(self) -> Any:
        raise NotImplementedError("no loader: there is nothing to resume")


class Ceiling:
    packages = ("simplejpeg",)
    decoders = ("stock",)
    has_state = False

    def prepare(self, task: Task, out: Path) -> None:
        """Nothing: the files are read before the clock starts."""

    def open(self, task: Task, state: Any) -> _InMemory:  # noqa: ARG002 - has_state is False
        return _InMemory(task)


if __name__ == "__main__":
    serve(Ceiling())
