"""`latentmill verify`: verify an export, or shards against their index."""

import argparse
import os
from dataclasses import asdict

from pipeline.common.arguments import bind
from pipeline.common.console import print_report, progress_line
from pipeline.common.errors import DONE, FAILED

HELP = "check an export, or shards against their index; exit 1 if anything is wrong"
# As in pipeline.export.verify.levels, which would import numpy.
LEVELS = ("listing", "counts", "hashes", "keys", "statistics", "encode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is verified, and how thoroughly."""
    bind(parser, run)
    parser.add_argument("path", help="directory or URL of the export, or of the index")
    parser.add_argument("--source", help="index of an export's data, to compare keys")
    parser.add_argument(
        "--shards", help="directory or URL of the shards (default: beside the index)"
    )
    parser.add_argument("--decode", action="store_true", help="shards: also decode every image")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--threads", type=int, default=cores, help="threads that decode (%(default)s)"
    )
    parser.add_argument(
        "--level", choices=LEVELS, help="checks of an export up to this one (statistics)"
    )
    parser.add_argument("--run", help="run or exported model of an export, for level encode")
    parser.add_argument(
        "--tasks", type=int, default=2, help="tasks to encode again at level encode (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify, print what was found, and fail on problems."""
    from pipeline.data.index.manifest import has_index

    path, shards = arguments.path, arguments.shards
    level = arguments.level or (LEVELS[-1] if arguments.run else LEVELS[-2])
    if has_index(path):
        from pipeline.data.index.verify import verify_shards

        how = {"decode": arguments.decode, "threads": arguments.threads}
        with progress_line() as progress:
            report = verify_shards(path, shards=shards, progress=progress, **how)
    elif level == "encode":
        from pipeline.export.verify.reencode import verify_with_run

        data = {"source": arguments.source, "shards": shards}
        report = verify_with_run(path, arguments.run, **data, num_tasks=arguments.tasks)
    else:
        from pipeline.export.verify.levels import verify_export

        report = verify_export(path, source=arguments.source, shards=shards, level=level)
    print_report(asdict(report), arguments.json, report.lines())
    return FAILED if report.problems else DONE
