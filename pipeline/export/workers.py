"""The number of this worker, and its queue of tasks.

The number comes from the launcher's environment, not from the other processes: no process waits for
another. A worker takes every n-th task, then those that others have not committed, from the end. A
task done twice does no harm (commit.py), so a single worker can finish the whole export.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.common.errors import UserError
from pipeline.export.plan import Task


@dataclass(frozen=True)
class Worker:
    """Worker `rank` of `world`; `local_rank`: number of its device on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    # Fraction of its share at which it begins: processes that were started without numbers all have
    # the same share.
    start: float = 0.0

    def task_queue(self, tasks: Sequence[Task]) -> list[Task]:
        """Return all tasks: this worker's share first, then the others' from the end.

        Each worker begins with the others' tasks at another offset: otherwise, when a worker dies,
        all others would do the same tasks at the same time.
        """
        own = list(tasks[self.rank :: self.world])
        others = [task for i, task in enumerate(tasks) if i % self.world != self.rank]
        own = _rotated(own, int(self.start * len(own)))
        return own + _rotated(others[::-1], self.rank * len(others) // self.world)


def _rotated(tasks: list[Task], by: int) -> list[Task]:
    return tasks[by:] + tasks[:by]


def find_worker(environment: Mapping[str, str], worker: str | None = None) -> Worker:
    """Return this worker, by `--worker i/n` or the environment; otherwise worker 0 of 1.

    accelerate launch and torchrun set RANK, WORLD_SIZE and LOCAL_RANK; a Slurm array sets
    SLURM_ARRAY_TASK_ID, _COUNT, _MIN and _STEP. In an array of launches both are combined. Without
    numbers the worker begins at a random task: another shell may run the same command.
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
    # An array such as 1,5,7 has no regular step: two elements may get the same number, which is
    # harmless, as every worker goes on with the tasks that are left.
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
