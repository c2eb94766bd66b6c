"""`python -m launch PLACE ...`: print the command, script or manifest; with --submit, run it.

`latentmill train`, `latentmill slurm` and `latentmill k8s` do the same.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

if __name__ == "__main__":
    # A light installation lacks them; the imports below need them.
    missing = [name for name in ("psutil", "yaml") if find_spec(name) is None]
    if missing:
        what = f"not installed here: {', '.join(missing)}"
        print(f"error: {what}. To launch, `pip install 'latentmill[train]'`.", file=sys.stderr)
        sys.exit(2)

from launch.job import TRAIN
from launch.start import PLACES, add_arguments, add_submit, start
from pipeline.common.arguments import parse
from pipeline.common.errors import WRONG_USE, UserError

DESCRIPTION = """\
Start a training or an export. Prints what would run; --submit runs it, after one process has
checked the config. On this machine, SIGTERM, SIGINT and SIGUSR1 are forwarded to every trainer, and
the exit code is that of the run: 0 done, 2 wrong use or config, 3 preempted (the same command
resumes), 1 everything else. On a cluster, the job is submitted; outcome.json in the run directory
records how it ended.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m launch`."""
    top = argparse.ArgumentParser(prog="python -m launch", description=DESCRIPTION)
    places = top.add_subparsers(dest="place", required=True, metavar="PLACE")
    for name, kind in PLACES.items():
        summary = (kind.__doc__ or "").splitlines()[0].rstrip(".")
        place = places.add_parser(name, help=summary, description=DESCRIPTION)
        place.add_argument("config", help="YAML file, or the name of shipped settings")
        place.add_argument(
            "overrides", nargs="*", metavar="a.b=c", help="settings that override the file's"
        )
        place.add_argument("--module", default=TRAIN, help="Python module to run (%(default)s)")
        add_arguments(place, kind)
        add_submit(place, "run it, not only print it")
    return top


def main(argv: Sequence[str]) -> int:
    """Print or run the job that the command line describes; returns the exit code."""
    try:
        arguments = parse(parser(), argv)
        return start(PLACES[arguments.place], arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
