"""`latentmill evaluate`: evaluate a run's checkpoint on held-out data."""

import argparse
from pathlib import Path

from pipeline.common.arguments import bind, step
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "evaluate a run's checkpoint on held-out data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which checkpoint, and on which split."""
    bind(parser, run)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--step", type=step, help="of the checkpoint, or `best`; else the newest")
    parser.add_argument("--split", help="of the data; else the config's held-out split")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print the metrics under the names that training logs."""
    from pipeline.evaluation.held_out import evaluate_run

    metrics = evaluate_run(arguments.run, step=arguments.step, split=arguments.split)
    print_report(dict(metrics), arguments.json)
    return DONE
