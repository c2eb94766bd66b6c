"""A folder of files under torch's own DataLoader, as torchvision's ImageFolder reads them.

Over ranks by DistributedSampler; a resume skips the sampler's first numbers, as accelerate's
`skip_first_batches` does for such data sets.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from benchmarks.rivals.loader import (
    Batch,
    OurDecoder,
    Task,
    TorchSession,
    files_of,
    pil_to_tensor,
    serve,
)


class _FileDataset(Dataset[tuple[int, Tensor]]):
    def __init__(self, task: Task) -> None:
        self._paths = [str(path) for path in files_of(task)]
        self._decoder = OurDecoder(task.size) if task.our_decoder else None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        with Path(self._paths[number]).open("rb") as file:
            if self._decoder:
                return number, self._decoder(file.read())
            return number, pil_to_tensor(Image.open(file))


class _SkipFirst(Sampler[int]):
    """A sampler without its first numbers."""

    def __init__(self, sampler: DistributedSampler[Any], first: int) -> None:
        self._sampler = sampler
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._sampler)[self._first :])

    def __len__(self) -> int:
        return len(self._sampler) - self._first


class _Session(TorchSession):
    def __init__(self, loader: DataLoader[Any], sampler: DistributedSampler[Any]) -> None:
        super().__init__(loader, tuple, sampler.set_epoch)
        self._num_seen = 0

    def epoch(self, number: int) -> Iterator[Batch]:
        self._num_seen = 0
        for ids, pixels in super().epoch(number):
            self._num_seen += len(ids)
            yield ids, pixels

    def state(self) -> int:
        return self._num_seen


class TorchFiles:
    packages = ("pillow",)
    decoders = ("stock", "ours")
    has_state = True

    def prepare(self, task: Task, out: Path) -> None:
        """Nothing: the files are there."""

    def open(self, task: Task, state: int | None) -> _Session:
        files = _FileDataset(task)
        sampler = DistributedSampler(files, task.world, task.rank, shuffle=True, seed=task.seed)
        rest: Sequence[int] | Sampler[int] = _SkipFirst(sampler, state) if state else sampler
        loader = DataLoader(
            files,
            batch_size=task.batch_size,
            sampler=rest,
            num_workers=task.workers,
            persistent_workers=True,
            generator=torch.Generator().manual_seed(task.seed),
        )
        return _Session(loader, sampler)


if __name__ == "__main__":
    serve(TorchFiles())
