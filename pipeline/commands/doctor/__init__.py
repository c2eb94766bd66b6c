"""`latentmill doctor`: examine a training that is to be started."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from pipeline.common.arguments import bind
from pipeline.common.console import print_report
from pipeline.common.errors import DONE, FAILED, UserError

HELP = "will this training start, and stay up? a line per check; exit 1 if one fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which training, and on how many processes."""
    bind(parser, run)
    parser.add_argument("config", type=Path, help="YAML file of the training")
    parser.add_argument("overrides", nargs="*", help="settings as a.b=c")
    text = "of the training on this machine (auto: one per GPU; without any, 1)"
    parser.add_argument("--processes", default="auto", metavar="N|auto", help=text)
    text = "what is to compute (auto: the GPUs; without any, the CPU)"
    parser.add_argument("--device", choices=["cpu", "gpu", "auto"], default="auto", help=text)
    parser.add_argument("--topology", type=Path, help="accelerate config file of the launch")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings, and fail if a check did."""
    from pipeline.commands.doctor.diagnose import diagnose

    asked = str(arguments.processes)
    if asked != "auto" and not asked.isdecimal():
        raise UserError(f"--processes {asked}: write a number of at least 1, or auto.")
    findings = diagnose(
        arguments.config,
        arguments.overrides,
        world=None if asked == "auto" else int(asked),
        device=arguments.device,
        topology=arguments.topology,
    )
    if arguments.json:
        print_report({"findings": [asdict(finding) for finding in findings]}, as_json=True)
    else:
        print("\n".join(finding.line(sys.stdout.isatty()) for finding in findings))
    return FAILED if any(finding.verdict == "FAIL" for finding in findings) else DONE
