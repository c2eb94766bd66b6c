"""`latentmill doctor`: examine a training that is to be started."""

import argparse
import sys
from dataclasses import asdict

from pipeline.common.arguments import add_config, add_processes, bind, settings_file
from pipeline.common.console import print_report
from pipeline.common.errors import DONE, FAILED

HELP = "will this training start, and stay up? a line per check; exit 1 if one fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which training, and on how many processes."""
    bind(parser, run)
    add_config(parser, "train")
    add_processes(parser)
    parser.add_argument("--topology", type=settings_file("accelerate"), help="of the launch")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings, and fail if a check did."""
    from pipeline.commands.doctor.diagnose import diagnose

    findings = diagnose(
        arguments.config,
        arguments.overrides,
        world=None if arguments.processes == "auto" else arguments.processes,
        device=arguments.device,
        topology=arguments.topology,
    )
    if arguments.json:
        print_report({"findings": [asdict(finding) for finding in findings]}, as_json=True)
    else:
        print("\n".join(finding.line(sys.stdout.isatty()) for finding in findings))
    return FAILED if any(finding.verdict == "FAIL" for finding in findings) else DONE
