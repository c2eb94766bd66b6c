"""`latentmill slurm`: the script of a job on a Slurm cluster, printed or submitted."""

import argparse

HELP = "print the script of a job on a Slurm cluster, or submit it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the job, and of the cluster."""
    from launch.start import PLACES, add_cluster_arguments

    add_cluster_arguments(parser, PLACES["slurm"])
    parser.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script or submit it; return the exit code."""
    from launch.start import PLACES, start

    return start(PLACES["slurm"], arguments)
