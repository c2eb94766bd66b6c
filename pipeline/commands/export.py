"""`latentmill export PART`: plan, run, look after, finish and check an export."""

import argparse
from dataclasses import asdict
from pathlib import Path

from pipeline.commands.verify import HELP as VERIFY_HELP
from pipeline.commands.verify import add_arguments as add_verify_arguments
from pipeline.common.arguments import add_export_arguments, add_part, sentence
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "the latents of a whole data set: plan, run, look after, finish and check an export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which part of an export's work is to be done."""
    parts = parser.add_subparsers(required=True, metavar="PART")
    plan = add_part(parts, "plan", run_plan, "write the plan, and do no more")
    plan.add_argument("config", type=Path, help="YAML file, see configs/export/")
    plan.add_argument("overrides", nargs="*", help="settings as a.b=c")
    text = "export as one process, without a launcher; several may be started, anywhere, any time"
    add_export_arguments(add_part(parts, "run", run, text))
    for name, text in (
        ("status", "how far an export is, from its files alone"),
        ("finalize", "finish an export whose tasks are all committed"),
        ("gc", "remove what dead attempts left behind; safe while others work"),
    ):
        part = add_part(parts, name, run_on_files, text)
        part.add_argument("out", help="directory or URL of the export")
        part.set_defaults(part=name)
    checks = parts.add_parser("verify", help=VERIFY_HELP, description=sentence(VERIFY_HELP))
    add_verify_arguments(checks)


def run(arguments: argparse.Namespace) -> int:
    """Take part in an export."""
    from pipeline.export.__main__ import run

    return run(arguments)


def run_plan(arguments: argparse.Namespace) -> int:
    """Write the plan of an export."""
    from pipeline.export.command import make_plan

    report = make_plan(arguments.config, arguments.overrides)
    print_report(asdict(report), arguments.json, report.lines())
    return DONE


def run_on_files(arguments: argparse.Namespace) -> int:
    """Look at an export, finish it, or clean up behind it, from its files alone."""
    from pipeline.export.status import collect_garbage, export_status, finalize_export

    parts = {"status": export_status, "finalize": finalize_export, "gc": collect_garbage}
    report = parts[arguments.part](arguments.out)
    print_report(asdict(report), arguments.json, report.lines())
    return DONE
