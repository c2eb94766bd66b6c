"""The interface of loaders, and the process that runs one measurement.

    python -m benchmarks.rivals.NAME TASK.json RESULT.json

Every loader's file ends with `serve(LOADER)`, which runs one action of a task and writes its
figures. Only this file measures, so all loaders are measured alike. It needs torch, and our package
only for tasks with our decoder, so it also runs in the rivals' environment.
"""

import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Class numbers, int64 [b]: the sample's number. Pixels, [b, ...]: uint8, or float in [0, 1].
Batch = tuple[Tensor, Tensor]

TICKS = os.sysconf("SC_CLK_TCK")  # of the times in /proc/PID/stat, per second


@dataclass(frozen=True)
class Task:
    """One measurement of one loader."""

    action: str
    pictures: str  # holds files/ (one JPEG each) and tar/ (webdataset shards) of the same bytes
    prepared: str  # the loader's own format
    count: int  # pictures
    size: int  # pixels of a side
    batch_size: int  # of this rank
    workers: int  # processes or threads
    our_decoder: bool
    seed: int = 0
    rank: int = 0
    world: int = 1
    stop_after: int = 0  # batches, where a run is stopped or resumed
    state: str = ""  # file of the stopped run's state


class Session(Protocol):
    """A loader that was opened: epochs, one after the other."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of the next epoch, numbered from 0."""
        ...

    def state(self) -> Any:
        """Return the state of the current epoch, for torch.save."""
        ...


class Loader(Protocol):
    """One file of this directory."""

    packages: tuple[str, ...]  # whose versions are printed
    decoders: tuple[str, ...]  # "stock", "ours"
    has_state: bool  # else a resume reads and drops what was delivered already

    def prepare(self, task: Task, out: Path) -> None:
        """Write the loader's own format, if it is not files or tars."""
        ...

    def open(self, task: Task, state: Any) -> Session:
        """Open for training: shuffled, this rank's share; `state` of a stopped run, or None."""
        ...


class TorchSession:
    """A torch DataLoader, or one of its children, as a Session."""

    def __init__(
        self,
        loader: Any,
        unpack: Callable[[Any], Batch],
        set_epoch: Callable[[int], object] | None = None,
    ) -> None:
        self._loader = loader
        self._unpack = unpack
        self._set_epoch = set_epoch

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        if self._set_epoch:
            self._set_epoch(number)
        return map(self._unpack, self._loader)

    def state(self) -> Any:
        """Return the state of the DataLoader."""
        return self._loader.state_dict()


class OurDecoder:
    """A JPEG's bytes -> uint8 [size, size, 3], by the decoder of our stream."""

    def __init__(self, size: int) -> None:
        from pipeline.data.decode import ImageDecode  # noqa: PLC0415 - absent for stock decoding

        self._decode = ImageDecode(size=size).decode
        self._shape = (size, size, 3)

    def __call__(self, data: bytes) -> Tensor:
        pixels = np.empty(self._shape, np.uint8)
        self._decode(data, pixels)
        return torch.from_numpy(pixels)


def pil_to_tensor(image: Any) -> Tensor:
    """Pixels of a PIL image as uint8 [height, width, 3]."""
    return torch.from_numpy(np.array(image.convert("RGB")))


def files_of(task: Task) -> list[Path]:
    """The JPEG files in order of their numbers."""
    return sorted(Path(task.pictures, "files").glob("*/*.jpg"))


def shards_of(task: Task) -> list[str]:
    """The webdataset shards."""
    return [str(path) for path in sorted(Path(task.pictures, "tar").glob("*.tar"))]


def _processes() -> Iterator[Path]:
    """/proc/PID of this process and all below it."""
    pids = ["self"]
    while pids:
        process = Path("/proc", pids.pop())
        yield process
        for thread in (process / "task").iterdir():
            pids += (thread / "children").read_text().split()


def _bytes_read() -> int:
    """Bytes that these processes fetched from the disk, mapped files included."""
    lines = [(process / "io").read_text().splitlines() for process in _processes()]
    return sum(int(dict(line.split(": ") for line in text)["read_bytes"]) for text in lines)


def _cpu_seconds() -> float:
    """Processor time of these processes, user and system; hardly depends on what else runs."""
    fields = [(process / "stat").read_text().rpartition(")")[2].split() for process in _processes()]
    return sum(int(user) + int(system) for *_, user, system in (row[:13] for row in fields)) / TICKS


def _drop_from_page_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them shows in `_bytes_read`."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _prepare(loader: Loader, task: Task) -> dict[str, Any]:
    """Write the loader's own format unless it is there; say what the loader is."""
    final = Path(task.prepared)
    if not final.exists():
        unfinished = final.with_name(f"{final.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        loader.prepare(task, unfinished)
        unfinished.rename(final)
    versions = {name: importlib.metadata.version(name) for name in (*loader.packages, "torch")}
    return {"versions": versions, "decoders": loader.decoders, "has_state": loader.has_state}


def _speed(loader: Loader, task: Task) -> dict[str, Any]:
    """Images per second of the second epoch: processes, files and code are warm."""
    session = loader.open(task, None)
    for _ in session.epoch(0):
        pass
    cpu, start, count = _cpu_seconds(), time.perf_counter(), 0
    for ids, pixels in session.epoch(1):
        count += len(ids)
        batch = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape[1:])}"
    seconds = time.perf_counter() - start
    cpu_us = (_cpu_seconds() - cpu) / count * 1e6
    return {"images_per_second": count / seconds, "cpu_us": cpu_us, "batch": batch}


def _drain(batches: Iterator[Batch]) -> dict[str, Any]:
    ids: list[int] = []
    means: list[float] = []
    steps = 0
    for numbers, pixels in batches:
        ids += numbers.tolist()
        scale = 255.0 if pixels.is_floating_point() else 1.0
        means += (pixels.flatten(1).to(torch.float64).mean(1) * scale).tolist()
        steps += 1
    return {"ids": ids, "means": means, "steps": steps}


def _ids(loader: Loader, task: Task) -> dict[str, Any]:
    return _drain(loader.open(task, None).epoch(0))


def _stop(loader: Loader, task: Task) -> dict[str, Any]:
    session = loader.open(task, None)
    batches = session.epoch(0)
    ids = [number for ids, _ in islice(batches, task.stop_after) for number in ids.tolist()]
    if loader.has_state:
        torch.save(session.state(), task.state)
    return {"ids": ids}


def _resume(loader: Loader, task: Task) -> dict[str, Any]:
    """Seconds and bytes to the first batch after the stop, data on disk, code in memory; the rest.

    Excludes the imports of the loader's file, but includes later ones, also in its workers.
    """
    _drop_from_page_cache(Path(task.pictures))
    bytes_before, start = _bytes_read(), time.perf_counter()
    state = torch.load(task.state) if loader.has_state else None
    batches = loader.open(task, state).epoch(0)
    if not loader.has_state:
        next(islice(batches, task.stop_after, task.stop_after), None)
    first = next(batches, None)
    if first is None:
        raise RuntimeError("after the resume no batch came")
    seconds, num_bytes = time.perf_counter() - start, _bytes_read() - bytes_before
    rest = _drain(batches)
    return {"seconds": seconds, "bytes": num_bytes, "ids": first[0].tolist() + rest["ids"]}


ACTIONS = {
    "prepare": _prepare,
    "speed": _speed,
    "ids": _ids,
    "stop": _stop,
    "resume": _resume,
}


def serve(loader: Loader) -> None:
    """Do what the task file says and write the result file."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    result = ACTIONS[task.action](loader, task)
    Path(sys.argv[2]).write_text(json.dumps(result))
