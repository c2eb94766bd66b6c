"""`python -m launch PLACE ...`: print what would run there; with --submit, run it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import local
from launch.job import Job, JobError

PLACES = {"local": local}

DESCRIPTION = """\
Start training or export. Prints the command; --submit runs it, forwards SIGTERM, SIGINT and SIGUSR1
to every trainer, and exits with the code of the run: 0 done, 2 wrong use or config, 3 preempted
(the same command resumes), 1 everything else.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m launch`."""
    top = argparse.ArgumentParser(prog="python -m launch", description=DESCRIPTION)
    places = top.add_subparsers(dest="place", required=True, metavar="PLACE")
    here = places.add_parser("local", help="this machine", description=DESCRIPTION)
    here.add_argument("config", type=Path, help="YAML of the run")
    here.add_argument("overrides", nargs="*", help="a.b=c ...; --option=value, too")
    here.add_argument("--module", default="pipeline.train", help="what to run (%(default)s)")
    here.add_argument("--processes", type=int, default=1, help="one per GPU or core (%(default)s)")
    here.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="(%(default)s)")
    here.add_argument("--topology", type=Path, help="accelerate's YAML, if not the fitting one")
    here.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (%(default)s)")
    here.add_argument("--submit", action="store_true", help="run it, not only print it")
    return top


def main(argv: Sequence[str]) -> int:
    """Print or run the job that the command line describes; returns the exit code."""
    arguments, rest = parser().parse_known_args(argv)
    # --a.b=c is an override in W&B's spelling; any other unknown option is a mistake.
    unknown = [option for option in rest if "=" not in option]
    if unknown:
        parser().error(f"unknown options: {' '.join(unknown)}")
    try:
        job = Job(
            module=arguments.module,
            config=arguments.config,
            overrides=(*arguments.overrides, *rest),
            num_processes=arguments.processes,
            device=arguments.device,
            topology=arguments.topology,
            num_threads=arguments.threads,
        )
        place = PLACES[arguments.place]
        print(place.command(job), flush=True)
        return place.run(job) if arguments.submit else 0
    except JobError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
