"""`latentmill slurm`: the script of a job on a Slurm cluster, printed or handed in."""

import argparse

HELP = "print the script of a job on a Slurm cluster; with --submit hand it in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what is run, on which machines, and whether it is handed in."""
    from launch.start import PLACES, add_cluster_arguments

    add_cluster_arguments(parser, PLACES["slurm"])
    parser.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it or hand it in; the exit code."""
    from launch.start import PLACES, start

    return start(PLACES["slurm"], arguments)
