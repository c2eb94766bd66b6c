"""Ours: `open_stream` over the unchanged webdataset shards and an index."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.rivals.loader import Batch, Task, serve
from pipeline.data.decode import ImageDecode
from pipeline.data.index import build_index
from pipeline.data.settings import DataConfig
from pipeline.data.stream import open_stream
from pipeline.data.stream.datasets import check_shards, open_indexes, order_of

# The pictures fill only some dozens of shards: more lanes would not mix better (`latentmill order
# --simulate` says so), and their windows would hold the whole set.
MAX_LANES = 16


class _Epochs:
    """One stream, never closed between epochs: it decodes the next one's start ahead.

    The last batch of an epoch is filled up with repeats of weight 0, which do not count.
    """

    def __init__(self, task: Task, first_step: int) -> None:
        batch_size = task.batch_size * task.world
        data = DataConfig(
            path=task.prepared,
            shards=str(Path(task.pictures, "tar")),
            split="all",
            decode=ImageDecode(size=task.size),
            threads=task.workers,
            lanes=max(n for n in range(1, MAX_LANES + 1) if batch_size % n == 0),
        )
        self._steps_per_epoch = -(-task.count // batch_size)
        self._next_step = first_step
        indexes = open_indexes(data)
        self._stream = open_stream(
            data,
            indexes,
            order_of(data, indexes, task.seed, batch_size, "mask"),
            check_shards(data, indexes),
            first_step=first_step,
            num_steps=3 * self._steps_per_epoch,
            rank=task.rank,
            world=task.world,
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        while self._next_step < (number + 1) * self._steps_per_epoch:
            batch = next(self._stream)
            self._next_step += 1
            counts = batch.weight > 0
            yield batch.label[counts], batch.x if counts.all() else batch.x[counts]

    def state(self) -> int:
        """The state is the step number."""
        return self._next_step


class Latentmill:
    packages = ("latentmill", "simplejpeg")
    decoders = ("ours",)
    has_state = True

    def prepare(self, task: Task, out: Path) -> None:
        build_index(Path(task.pictures, "tar"), out=out)

    def open(self, task: Task, state: int | None) -> _Epochs:
        return _Epochs(task, state or 0)


if __name__ == "__main__":
    serve(Latentmill())
