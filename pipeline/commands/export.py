"""`latentmill export PART`: plan, run, watch, finish and check an export."""

import argparse
import os
from dataclasses import asdict

from pipeline.commands.verify import HELP as VERIFY_HELP
from pipeline.commands.verify import add_arguments as add_verify_arguments
from pipeline.common.arguments import (
    add_config,
    add_dry_run,
    add_export_arguments,
    add_part,
    add_processes,
    sentence,
)
from pipeline.common.console import print_report, progress
from pipeline.common.errors import DONE, PREEMPTED, UserError

HELP = "export the latents of a data set: plan, run, watch, finish and check"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the parts of an export's work."""
    parts = parser.add_subparsers(required=True, metavar="PART")
    plan = add_part(parts, "plan", run_plan, "write the plan only")
    add_config(plan, "export")
    add_dry_run(plan, "print the plan, and write nothing")
    text = "export, or continue an export; any number of these may run, on any machines"
    work = add_part(parts, "run", run, text)
    add_export_arguments(work)
    add_processes(work)
    for name, text in (
        ("status", "the progress of an export, read from its files alone"),
        ("finalize", "finish an export whose tasks are all committed"),
        ("gc", "remove the files of killed attempts; safe while workers run"),
    ):
        part = add_part(parts, name, run_on_files, text)
        part.add_argument("out", help="directory or URL of the export")
        part.set_defaults(part=name)
    checks = parts.add_parser("verify", help=VERIFY_HELP, description=sentence(VERIFY_HELP))
    add_verify_arguments(checks)


def run(arguments: argparse.Namespace) -> int:
    """Export in as many processes as are asked for; a single one is this process."""
    from launch import local, workers
    from launch.gpus import choose
    from launch.job import EXPORT, Job
    from pipeline.export.__main__ import run as run_here
    from pipeline.export.status import export_status

    # One of several workers, which a cluster or a launcher has started.
    is_one = arguments.worker is not None or "RANK" in os.environ
    if is_one and (arguments.processes, arguments.device) != ("auto", "auto"):
        raise UserError(
            "--worker, or RANK in the environment, makes this process one of several that are "
            "started by hand: leave --processes and --device out."
        )
    if is_one:
        return run_here(arguments)
    processes, device, chosen = choose(arguments.processes, arguments.device, EXPORT)
    if processes == 1 and arguments.device == "auto":
        return run_here(arguments)
    progress(chosen)
    options = ["--retry-failed"] * arguments.retry_failed
    options += ["--json"] * (arguments.json and arguments.dry_run)
    job = Job(
        module=EXPORT,
        config=arguments.config,
        overrides=tuple(arguments.overrides),
        options=tuple(options),
        num_processes=processes,
        device=device,
    )
    if arguments.dry_run:
        if not arguments.json:
            print(workers.command(job), flush=True)
        return local.check(job, is_shown=True)
    code = workers.run(job)
    if arguments.json and code in (DONE, PREEMPTED):
        print_report(asdict(export_status(job.value("out") or "")), as_json=True)
    return code


def run_plan(arguments: argparse.Namespace) -> int:
    """Write the plan of an export."""
    from pipeline.common import strict
    from pipeline.export.__main__ import show_plan
    from pipeline.export.command import make_plan
    from pipeline.export.settings import ExportConfig

    config = strict.load(ExportConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        show_plan(config, as_json=arguments.json)
    else:
        report = make_plan(config)
        print_report(asdict(report), arguments.json, report.lines())
    return DONE


def run_on_files(arguments: argparse.Namespace) -> int:
    """Report on an export, finish it, or clean it up, from its files alone."""
    from pipeline.export.status import collect_garbage, export_status, finalize_export

    parts = {"status": export_status, "finalize": finalize_export, "gc": collect_garbage}
    report = parts[arguments.part](arguments.out)
    print_report(asdict(report), arguments.json, report.lines())
    return DONE
