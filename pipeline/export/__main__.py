"""The export command, as `latentmill export run CONFIG [a.b=c ...]` starts it.

It runs as any number of processes: under accelerate launch or torchrun, as a Slurm array, or in
several shells with `--worker i/n` (without it their shares overlap, which only costs time). The
same command continues a stopped export, with any number of processes.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType

from pipeline.common import needs

if __name__ == "__main__":
    needs.check()  # before anything of the extra is imported

from pipeline.common import strict
from pipeline.common.arguments import add_export_arguments, parse
from pipeline.common.console import print_report
from pipeline.common.errors import DONE, FAILED, WRONG_USE, StoreError, UserError
from pipeline.common.leaving import leave, let_speaker_end_first
from pipeline.data.storage import ShardReadError
from pipeline.export.command import begin, make_plan, work_through
from pipeline.export.failures import clear_failures, is_unwritable
from pipeline.export.settings import ExportConfig
from pipeline.export.status import export_status
from pipeline.export.workers import find_worker

# The worker ends after the current batch.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(argv: Sequence[str]) -> int:
    """Run the command; `argv` without the program's name."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    add_export_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        arguments = parse(parser, argv)
    except UserError as error:  # a config that is not there
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            let_speaker_end_first(os.environ)
        return WRONG_USE
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Run one worker of an export and return the exit code.

    With `json` the status of the export is printed on stdout in the end.
    """
    asked_to_stop = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        del number, frame
        asked_to_stop = True

    previous = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    # All processes of a machine have the same mistakes at the start: one of them prints them.
    prints_mistakes = os.environ.get("LOCAL_RANK", "0") == "0"
    out = ""
    try:
        config = strict.load(ExportConfig, arguments.config, arguments.overrides)
        if arguments.dry_run:
            if prints_mistakes:
                show_plan(config, as_json=arguments.json)
            return DONE
        worker, out = find_worker(os.environ, arguments.worker), config.out
        prepared, guarantee = begin(config, worker)
        if worker.rank == 0:
            print(f"export: {out}: each task once, by {guarantee}", file=sys.stderr)
        prints_mistakes = True  # from here on errors of the processes differ
        if arguments.retry_failed:  # a late start may clear a fresh failure: it costs one retry
            clear_failures(prepared.export)
        code = work_through(prepared, worker, lambda: asked_to_stop)
        if arguments.json:
            print_report(asdict(export_status(out)), as_json=True)
        return code
    except (UserError, OSError) as error:
        code, text = explain(error, out)
        if prints_mistakes or not isinstance(error, UserError):
            print(f"error: {text}", file=sys.stderr, flush=True)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            let_speaker_end_first(os.environ)
        return code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def show_plan(config: ExportConfig, *, as_json: bool) -> None:
    """Print what the export would do and write nothing: the resolved config, the plan as comments.

    Raises UserError for what keeps it from beginning.
    """
    report = asdict(make_plan(config, is_dry_run=True))
    if as_json:
        print_report(report, as_json=True)
        return
    print(strict.dump(config), end="")
    print("\n".join(f"# {name.replace('_', ' ')}: {value}" for name, value in report.items()))


def explain(error: UserError | OSError, out: str) -> tuple[int, str]:
    """Return exit code and message; raise an error again that needs its traceback."""
    if isinstance(error, UserError):
        return WRONG_USE, f"{error}"
    if isinstance(error, StoreError | ShardReadError):
        return FAILED, f"{error}"
    if is_unwritable(error):
        return WRONG_USE, (
            f"{error.filename or out} cannot be used: {error.strerror}. What is committed is "
            "whole: fix this, or set out to another directory, and give the same command again."
        )
    raise error


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
