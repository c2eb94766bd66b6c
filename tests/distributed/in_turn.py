"""Several jobs in one start of the processes, one after the other.

    in_turn.py KIND ARGUMENT... [-- KIND ARGUMENT...]...

KIND: `train`, with the arguments of `latentmill train`, or a worker of this folder: `record`,
`strike` or `hold`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

from pipeline.common.errors import DONE
from pipeline.common.leaving import leave
from pipeline.train import main as train
from tests.distributed import equivalence_worker, nonfinite_worker, state_memory_worker

JOBS: Mapping[str, Callable[..., int]] = {
    "train": lambda *arguments: train(arguments),
    "record": equivalence_worker.main,
    "strike": nonfinite_worker.main,
    "hold": state_memory_worker.main,
}


def words(*jobs: Sequence[object]) -> list[str]:
    """Return the command line of some jobs."""
    found: list[str] = []
    for job in jobs:
        found += ["--"] * bool(found) + [str(word) for word in job]
    return found


def main(arguments: Sequence[str]) -> int:
    """Do the jobs; return the first exit code that is not 0."""
    jobs: list[list[str]] = [[]]
    for word in arguments:
        if word == "--":
            jobs.append([])
        else:
            jobs[-1].append(word)
    for kind, *rest in jobs:
        code = JOBS[kind](*rest)
        if code:
            return code
    return DONE


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
