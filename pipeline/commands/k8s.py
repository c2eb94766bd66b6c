"""`latentmill k8s`: the manifest of a job on Kubernetes, printed or submitted."""

import argparse

HELP = "print the manifest of a job on Kubernetes, or submit it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the job, and of the cluster."""
    from launch.start import PLACES, add_cluster_arguments

    add_cluster_arguments(parser, PLACES["k8s"])
    parser.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the manifest or submit it; return the exit code."""
    from launch.start import PLACES, start

    return start(PLACES["k8s"], arguments)
