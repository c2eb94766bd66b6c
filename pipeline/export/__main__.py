"""The export command: `[accelerate launch [...]] -m pipeline.export CONFIG [a.b=c ...]`.

It runs as any number of processes, under accelerate launch, torchrun, as a Slurm array, or in
several shells (`--worker i/n`, or plainly: shares overlap then, which costs time only). The same
command goes on where it stopped, whatever the number of processes is now.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from pipeline import needs

if __name__ == "__main__":
    needs.check()  # before anything of the extra is imported

from pipeline import strict
from pipeline.errors import DONE, PREEMPTED, WRONG_USE, UserError
from pipeline.export.finalize import finalize
from pipeline.export.plan import adopt_plan
from pipeline.export.prepare import Prepared, prepare
from pipeline.export.progress import Progress
from pipeline.export.run import run_worker
from pipeline.export.settings import ExportConfig
from pipeline.export.workers import Worker, find_worker


def begin(config: ExportConfig, worker: Worker) -> Prepared:
    """Load what the config names and store the plan; every process comes to the same result.

    Raises UserError when something is missing, or `config.out` holds an export of something else.
    """
    prepared = prepare(config, worker)
    if not prepared.plan.tasks:
        raise UserError(f"The split {config.data.split!r} holds no sample: set data.split.")
    adopt_plan(prepared.export, prepared.plan)
    return prepared


def work_through(prepared: Prepared, worker: Worker, should_stop: Callable[[], bool]) -> int:
    """Do tasks until all are done, finish the export, and return the exit code.

    Raises UserError when too many rows of a shard fail, or the data changed meanwhile.
    """
    export, plan = prepared.export, prepared.plan
    if not export.success.exists():
        progress = Progress(export, plan, enabled=worker.rank == 0)
        if not run_worker(
            export, plan, prepared.work, worker=worker, should_stop=should_stop, progress=progress
        ):
            return PREEMPTED
        progress.report()
    finalize(export, plan, prepared.keys_of)
    if worker.rank == 0:
        print(f"export: {plan.rows:,} rows in {export.root}", file=sys.stderr)
    return DONE


def main(argv: Sequence[str]) -> int:
    """Run the command; `argv` without the program's name."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file, see configs/export/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings in place of its")
    parser.add_argument("--worker", metavar="i/n", help="be worker i (from 0) of n")
    arguments = parser.parse_intermixed_args(argv)
    asked_to_stop = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        del number, frame
        asked_to_stop = True

    previous = signal.signal(signal.SIGTERM, remember)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        config = strict.load(ExportConfig, arguments.config, arguments.overrides)
        worker = find_worker(os.environ, arguments.worker)
        prepared = begin(config, worker)
        is_first = True  # from here on an error is this process's own
        return work_through(prepared, worker, lambda: asked_to_stop)
    except UserError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
