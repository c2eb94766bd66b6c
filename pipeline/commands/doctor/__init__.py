"""`latentmill doctor`: check a training before it starts."""

import argparse
import sys
from dataclasses import asdict

from pipeline.common.arguments import add_config, add_processes, bind, settings_file
from pipeline.common.console import print_report
from pipeline.common.errors import DONE, FAILED

HELP = "check whether a training will start and keep running; exit 1 if a check fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the training, and its processes."""
    bind(parser, run)
    add_config(parser, "train")
    add_processes(parser)
    parser.add_argument(
        "--topology", type=settings_file("accelerate"), metavar="NAME|FILE", help="of accelerate"
    )
    text = "does a step fit a GPU of N GB (10^9 bytes); without: this machine's memory"
    parser.add_argument("--card-gb", type=float, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; exit code 1 if a check failed."""
    from pipeline.commands.doctor.diagnose import diagnose

    findings = diagnose(
        arguments.config,
        arguments.overrides,
        world=None if arguments.processes == "auto" else arguments.processes,
        device=arguments.device,
        topology=arguments.topology,
        card_gb=arguments.card_gb,
    )
    if arguments.json:
        print_report({"findings": [asdict(finding) for finding in findings]}, as_json=True)
    else:
        print("\n".join(finding.line(sys.stdout.isatty()) for finding in findings))
    return FAILED if any(finding.verdict == "FAIL" for finding in findings) else DONE
