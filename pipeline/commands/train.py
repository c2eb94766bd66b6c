"""`latentmill train`: train on this machine, by default in one process per GPU."""

import argparse

from pipeline.common.arguments import add_config, add_dry_run

HELP = "train, or resume: the same command continues a stopped training"
EPILOG = """\
After Ctrl-C, SIGTERM or SIGUSR1 every process saves and ends; a second Ctrl-C kills them.
Exit codes: 0 done, 2 wrong use or config, 3 stopped and resumable, 1 everything else.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a training and of its processes."""
    from launch.job import TRAIN
    from launch.start import PLACES, add_arguments

    add_config(parser, "train")
    add_dry_run(parser, "print the command and the resolved config; write nothing")
    add_arguments(parser, PLACES["local"])
    parser.epilog = EPILOG
    parser.set_defaults(call=run, module=TRAIN, submit=True)


def run(arguments: argparse.Namespace) -> int:
    """Train, and return the exit code of the run."""
    from launch.start import PLACES, start

    return start(PLACES["local"], arguments)
