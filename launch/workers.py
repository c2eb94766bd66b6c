"""A Job whose processes need no rendezvous: an export on this machine, without a launcher.

Job -> N processes with RANK, WORLD_SIZE, LOCAL_RANK in the environment -> one exit code of all
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from launch.job import Job
from launch.local import Command, end_with_us, environment, forwarding
from pipeline.common.errors import DONE, FAILED, PREEMPTED, WRONG_USE


def command(job: Job) -> Command:
    """What every process runs; `run` adds its RANK and LOCAL_RANK."""
    argv = (sys.executable, "-m", job.module, *job.arguments)
    return Command(argv, environment(job) | {"WORLD_SIZE": str(job.num_processes)})


def run(job: Job) -> int:
    """Run the processes to their end, forward our signals to them, and return the exit code."""
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
    return exit_code_of(codes)


def exit_code_of(codes: Sequence[int]) -> int:
    """The exit code of all: done if one process ended well, since it saw all tasks committed."""
    return next((code for code in (DONE, WRONG_USE, PREEMPTED) if code in codes), FAILED)
