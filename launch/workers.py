"""A Job whose processes need not meet: an export on this machine, without any launcher between.

Job -> N processes that are told RANK, WORLD_SIZE, LOCAL_RANK -> their exit codes -> one
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from launch.job import Job
from launch.local import Command, end_with_us, environment, forwarding
from pipeline.common.errors import DONE, FAILED, PREEMPTED, WRONG_USE


def command(job: Job) -> Command:
    """What each process runs, but for its number."""
    argv = (sys.executable, "-m", job.module, *job.arguments)
    return Command(argv, environment(job) | {"WORLD_SIZE": str(job.num_processes)})


def run(job: Job) -> int:
    """Run the processes to their end; they get what signals we get."""
    what = command(job)
    processes = [
        subprocess.Popen(
            what.argv,
            env=os.environ | what.env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
            preexec_fn=end_with_us,
        )
        for rank in range(job.num_processes)
    ]
    with forwarding(lambda: processes):
        codes = [process.wait() for process in processes]
    return together(codes)


def together(codes: Sequence[int]) -> int:
    """The exit code of all: done if one of them has seen the end of the work, else what is told."""
    return next((code for code in (DONE, WRONG_USE, PREEMPTED) if code in codes), FAILED)
