"""Which worker this process is, and which tasks it takes in which order.

The number comes from the environment of a launcher, never from the other processes: none of them
waits for another. A worker takes every n-th task, then those that others have not committed, from
the end. Work done twice is harmless (commit.py), so any worker alone finishes the whole export.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.common.errors import UserError
from pipeline.export.plan import Task


@dataclass(frozen=True)
class Worker:
    """Number `rank` of `world`, and the number of its device on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    # Where in its share it begins, as a part of it: processes that were started without numbers
    # have all the same share.
    start: float = 0.0

    def task_queue(self, tasks: Sequence[Task]) -> list[Task]:
        """Return all tasks: the own share first, then the others' from the end.

        Each worker begins with the others' at a place of its own: if one dies, all help, and would
        do the same tasks at the same time.
        """
        own = list(tasks[self.rank :: self.world])
        others = [task for i, task in enumerate(tasks) if i % self.world != self.rank]
        own = _rotated(own, int(self.start * len(own)))
        return own + _rotated(others[::-1], self.rank * len(others) // self.world)


def _rotated(tasks: list[Task], by: int) -> list[Task]:
    return tasks[by:] + tasks[:by]


def find_worker(environment: Mapping[str, str], worker: str | None = None) -> Worker:
    """Read who this process is: `--worker i/n`, else the environment, else alone.

    accelerate launch and torchrun set RANK, WORLD_SIZE and LOCAL_RANK; a Slurm array sets
    SLURM_ARRAY_TASK_ID, _COUNT, _MIN and _STEP. In an array of launches both count. Without any
    number it begins anywhere: another shell may have started the same command.
    """
    if worker is not None:
        return _parse(worker)
    rank, world = _pair(environment, "RANK", "WORLD_SIZE")
    local_rank = _number(environment, "LOCAL_RANK", 0)
    if "SLURM_ARRAY_TASK_ID" not in environment:
        start = random.random() if "RANK" not in environment else 0.0
        return Worker(rank, world, local_rank, start)
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    element = (_number(environment, "SLURM_ARRAY_TASK_ID", 0) - first) // step
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT", 1)
    # An array written as 1,5,7 has no regular step: any number will do, as all shares get done.
    return Worker((element % count) * world + rank, count * world, local_rank)


def _parse(worker: str) -> Worker:
    match = re.fullmatch(r"(\d+)/(\d+)", worker)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--worker {worker}: expected i/n with 0 <= i < n, such as 0/4.")
    return Worker(int(match[1]), int(match[2]), local_rank=int(match[1]))


def _pair(environment: Mapping[str, str], rank: str, world: str) -> tuple[int, int]:
    number, count = _number(environment, rank, 0), _number(environment, world, 1)
    if not 0 <= number < count:
        raise UserError(f"{rank}={number} does not fit {world}={count} in the environment.")
    return number, count


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name}={text} in the environment is no number.")
    return int(text)
