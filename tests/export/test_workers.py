"""Who a process is, from the environments of accelerate launch, torchrun and Slurm arrays."""

import pytest

from pipeline.errors import UserError
from pipeline.export.plan import Task
from pipeline.export.workers import Worker, find_worker

TASKS = [Task(str(number), number, 1, f"{number}.tar", "") for number in range(10)]


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Worker(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Worker(3, 4, 1)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "5"}, Worker(2, 5, 0)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "5",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            Worker(3, 5, 0),
        ),
        (  # an array of launches of two processes each
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
            },
            Worker(3, 6, 1),
        ),
    ],
)
def test_environment(environment: dict[str, str], expected: Worker):
    assert find_worker(environment) == expected


def test_option_comes_first():
    assert find_worker({"RANK": "1", "WORLD_SIZE": "2"}, "3/8") == Worker(3, 8)


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/2", "1/0", "0/4/2"])
def test_senseless_option_is_refused(text: str):
    with pytest.raises(UserError, match="--worker"):
        find_worker({}, text)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "1"}],
)
def test_senseless_environment_is_refused(environment: dict[str, str]):
    with pytest.raises(UserError, match="RANK|WORLD_SIZE"):
        find_worker(environment)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_shares_are_disjoint_and_every_order_is_complete(world: int):
    orders = [Worker(rank, world).order(TASKS) for rank in range(world)]
    assert all(sorted(order, key=TASKS.index) == TASKS for order in orders)
    sizes = [len(TASKS[rank::world]) for rank in range(world)]
    own = [task.name for order, size in zip(orders, sizes, strict=True) for task in order[:size]]
    assert sorted(own) == sorted(task.name for task in TASKS)


def test_others_are_taken_from_the_end():
    names = [task.name for task in Worker(1, 3).order(TASKS)]
    assert names == ["1", "4", "7", "9", "8", "6", "5", "3", "2", "0"]
