"""`python -m launch PLACE ...`: print what would run there; with --submit, run it."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

if __name__ == "__main__":
    # A light installation reads exports only. What follows imports these.
    missing = [name for name in ("psutil", "yaml") if find_spec(name) is None]
    if missing:
        what = f"not installed here: {', '.join(missing)}"
        print(f"error: {what}. To launch, `pip install 'latentmill[train]'`.", file=sys.stderr)
        sys.exit(2)

from launch.job import JobError, Strategy
from launch.k8s import Kubernetes
from launch.local import Local
from launch.slurm import Slurm

PLACES = {"local": Local, "slurm": Slurm, "k8s": Kubernetes}

DESCRIPTION = """\
Start training or export. Prints what would run; --submit runs it, after one process has read the
config. On this machine it forwards SIGTERM, SIGINT and SIGUSR1 to every trainer, and exits with the
code of the run: 0 done, 2 wrong use or config, 3 preempted (the same command resumes), 1 everything
else. To a cluster it hands the job in, and exits; the run's outcome.json says how that ended.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m launch`."""
    top = argparse.ArgumentParser(prog="python -m launch", description=DESCRIPTION)
    places = top.add_subparsers(dest="place", required=True, metavar="PLACE")
    for name, kind in PLACES.items():
        summary = (kind.__doc__ or "").splitlines()[0].rstrip(".")
        place = places.add_parser(name, help=summary, description=DESCRIPTION)
        place.add_argument("config", type=Path, help="YAML of the run")
        place.add_argument("overrides", nargs="*", help="a.b=c ...; --option=value, too")
        place.add_argument("--module", default="pipeline.train", help="what to run (%(default)s)")
        place.add_argument(
            "--strategy", choices=get_args(Strategy), help="over several processes (ddp)"
        )
        place.add_argument(
            "--topology", type=Path, help="accelerate's YAML, if not the fitting one"
        )
        place.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (%(default)s)")
        place.add_argument("--submit", action="store_true", help="run it, not only print it")
        kind.add_arguments(place)
    return top


def main(argv: Sequence[str]) -> int:
    """Print or run the job that the command line describes; returns the exit code."""
    arguments, rest = parser().parse_known_args(argv)
    # --a.b=c is an override in W&B's spelling; any other unknown option is a mistake.
    unknown = [option for option in rest if "=" not in option]
    if unknown:
        parser().error(f"unknown options: {' '.join(unknown)}")
    try:
        place = PLACES[arguments.place].from_arguments(arguments)
        job = place.job(arguments, (*arguments.overrides, *rest))
        print(place.command(job), flush=True)
        return place.run(job) if arguments.submit else 0
    except JobError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
