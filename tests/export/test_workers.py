"""The worker of a process, in environments of accelerate launch, torchrun, Slurm arrays."""

from dataclasses import replace

import pytest

from pipeline.common.errors import UserError
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
    worker = find_worker(environment)
    assert replace(worker, start=0) == expected


def test_option_comes_first():
    assert find_worker({"RANK": "1", "WORLD_SIZE": "2"}, "3/8") == Worker(3, 8, local_rank=3)


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
    orders = [Worker(rank, world).task_queue(TASKS) for rank in range(world)]
    assert all(sorted(order, key=TASKS.index) == TASKS for order in orders)
    sizes = [len(TASKS[rank::world]) for rank in range(world)]
    own = [task.name for order, size in zip(orders, sizes, strict=True) for task in order[:size]]
    assert sorted(own) == sorted(task.name for task in TASKS)


def test_others_are_taken_from_the_end_each_from_a_place_of_its_own():
    names = [[task.name for task in Worker(rank, 3).task_queue(TASKS)] for rank in range(3)]
    assert names[0] == ["0", "3", "6", "9", "8", "7", "5", "4", "2", "1"]
    assert names[1] == ["1", "4", "7", "6", "5", "3", "2", "0", "9", "8"]
    assert names[2] == ["2", "5", "8", "3", "1", "0", "9", "7", "6", "4"]


def test_processes_without_numbers_begin_anywhere():
    starts = {find_worker({}).start for _ in range(20)}
    assert len(starts) == 20
    assert all(0 <= start < 1 for start in starts)
    orders = {Worker(start=start).task_queue(TASKS)[0].name for start in (0, 0.35, 0.99)}
    assert orders == {"0", "3", "9"}


def test_when_a_worker_dies_the_others_do_its_tasks_once_not_all_of_them_each():
    """Simulated: all workers in step, one task per turn; two may begin the same task in a turn."""
    world, tasks = 16, [replace(TASKS[0], name=f"{i}") for i in range(1600)]
    orders = {rank: iter(Worker(rank, world).task_queue(tasks)) for rank in range(1, world)}
    done, runs, turns = set[str](), 0, 0
    while len(done) < len(tasks):
        turn = [
            next((t.name for t in order if t.name not in done), None) for order in orders.values()
        ]
        begun = [name for name in turn if name is not None]
        done |= set(begun)
        runs += len(begun)
        turns += 1
    assert turns < 1.15 * len(tasks) / (world - 1)
    assert runs < 1.1 * len(tasks)
