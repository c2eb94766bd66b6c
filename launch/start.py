"""From a command line to a job that is shown, checked, run or handed in, whatever the place.

options -> place, job -> print the command -> (--dry-run) one process shows what it resolves to
                                           -> (--submit)  run it, or hand it in
"""

import argparse
from typing import get_args

from launch.job import EXPORT, TRAIN, Strategy
from launch.k8s import Kubernetes
from launch.local import Local
from launch.slurm import Slurm
from pipeline.common.arguments import add_accept_change
from pipeline.common.shipped import find, shipped

Place = type[Local] | type[Slurm] | type[Kubernetes]
PLACES: dict[str, Place] = {"local": Local, "slurm": Slurm, "k8s": Kubernetes}


def add_arguments(parser: argparse.ArgumentParser, place: Place) -> None:
    """Add what decides how processes start at a place."""
    place.add_arguments(parser)
    strategies = get_args(Strategy)
    parser.add_argument("--strategy", choices=strategies, help="over several processes (ddp)")
    names = ", ".join(shipped("accelerate"))
    parser.add_argument(
        "--topology",
        metavar="NAME|FILE",
        help=f"of accelerate, where the one that fits is not wanted: a YAML file, or {names}",
    )
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (%(default)s)")
    add_accept_change(parser)


def add_ways(parser: argparse.ArgumentParser, submit: str) -> None:
    """Add what is done with the job: printed if nothing else is said."""
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--submit", action="store_true", help=submit)
    text = "print it, and what one process makes of the config; write nothing"
    ways.add_argument("--dry-run", action="store_true", help=text)


def add_cluster_arguments(parser: argparse.ArgumentParser, place: Place) -> None:
    """Add what `latentmill slurm` and `latentmill k8s` are told."""
    names = ", ".join([*shipped("train"), *shipped("export")])
    text = f"YAML file, or shipped settings: {names}"
    parser.add_argument("config", metavar="CONFIG", help=text)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings in place of its")
    text = "the config is one of an export"
    parser.add_argument(
        "--export", dest="module", action="store_const", const=EXPORT, default=TRAIN, help=text
    )
    add_ways(parser, "hand it in")
    add_arguments(parser, place)


def start(place: Place, arguments: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code; UserError for what makes no sense."""
    arguments.config = find("export" if arguments.module == EXPORT else "train", arguments.config)
    if arguments.topology is not None:
        arguments.topology = find("accelerate", arguments.topology)
    arguments.options = tuple(f"--accept-change={name}" for name in arguments.accept_change)
    here = place.from_arguments(arguments)
    job = here.job(arguments, tuple(arguments.overrides))
    if arguments.dry_run or not arguments.submit or place is not Local:
        print(here.command(job), flush=True)
    if arguments.dry_run:
        return here.check(job)
    return here.run(job) if arguments.submit else 0
