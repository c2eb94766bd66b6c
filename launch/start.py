"""From a command line to a job that is printed, checked, run or submitted, at any place.

options -> place, job -> print the command -> (--dry-run) one process prints the resolved config
                                           -> (--submit)  run or submit it
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
    """Add the options that decide how processes start at a place."""
    place.add_arguments(parser)
    group = parser.add_argument_group("strategy and threads")
    strategies = get_args(Strategy)
    group.add_argument(
        "--strategy", choices=strategies, help="of training in several processes (ddp)"
    )
    names = ", ".join(shipped("accelerate"))
    group.add_argument(
        "--topology",
        metavar="NAME|FILE",
        help=f"accelerate's settings, if not those that fit: a YAML file, or {names}",
    )
    text = "OMP_NUM_THREADS (%(default)s)"
    group.add_argument("--threads", type=int, default=1, metavar="N", help=text)
    add_accept_change(parser)


def add_submit(parser: argparse.ArgumentParser, submit: str) -> None:
    """Add what to do with the job; without either option it is printed."""
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--submit", action="store_true", help=submit)
    text = "print it, and the resolved config; write nothing"
    ways.add_argument("--dry-run", action="store_true", help=text)


def add_cluster_arguments(parser: argparse.ArgumentParser, place: Place) -> None:
    """Add the arguments of `latentmill slurm` and `latentmill k8s`."""
    names = ", ".join([*shipped("train"), *shipped("export")])
    text = f"YAML file, or shipped settings: {names}"
    parser.add_argument("config", metavar="CONFIG", help=text)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that override the file's"
    )
    text = "the config is one of an export"
    parser.add_argument(
        "--export", dest="module", action="store_const", const=EXPORT, default=TRAIN, help=text
    )
    add_submit(parser, "submit it")
    add_arguments(parser, place)


def start(place: Place, arguments: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code; raises UserError for wrong use."""
    arguments.config = find("export" if arguments.module == EXPORT else "train", arguments.config)
    if arguments.topology is not None:
        arguments.topology = find("accelerate", arguments.topology)
    arguments.options = tuple(f"--accept-change={name}" for name in arguments.accept_change)
    target = place.from_arguments(arguments)
    job = target.job(arguments, tuple(arguments.overrides))
    if arguments.dry_run or not arguments.submit or place is not Local:
        print(target.command(job), flush=True)
    if arguments.dry_run:
        return target.check(job)
    return target.run(job) if arguments.submit else 0
