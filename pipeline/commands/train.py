"""`latentmill train`: train on this machine, in as many processes as there are GPUs."""

import argparse

from pipeline.common.arguments import add_config, add_dry_run

HELP = "train, or resume the training: the same command goes on where it stopped"
EPILOG = """\
Ctrl-C, SIGTERM and SIGUSR1 let every process save and end; a second Ctrl-C ends at once.
Exit codes: 0 done, 2 wrong use or config, 3 stopped and resumable, 1 everything else.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what is trained, and in which processes."""
    from launch.job import TRAIN
    from launch.start import PLACES, add_arguments

    add_config(parser, "train")
    add_dry_run(parser, "print the resolved config and what would run, and write nothing")
    add_arguments(parser, PLACES["local"])
    parser.epilog = EPILOG
    parser.set_defaults(call=run, module=TRAIN, submit=True)


def run(arguments: argparse.Namespace) -> int:
    """Train, and return the exit code of the run."""
    from launch.start import PLACES, start

    return start(PLACES["local"], arguments)
