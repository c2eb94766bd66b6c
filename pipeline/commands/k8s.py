"""`latentmill k8s`: the manifest of a job on Kubernetes, printed or handed in."""

import argparse

HELP = "print the manifest of a job on Kubernetes; with --submit hand it in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what is run, on which machines, and whether it is handed in."""
    from launch.start import PLACES, add_cluster_arguments

    add_cluster_arguments(parser, PLACES["k8s"])
    parser.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it or hand it in; the exit code."""
    from launch.start import PLACES, start

    return start(PLACES["k8s"], arguments)
