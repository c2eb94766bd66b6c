"""`latentmill index`: index webdataset shards."""

import argparse
from pathlib import Path

from pipeline.common.arguments import add_split, add_workers, bind
from pipeline.common.console import print_report, progress
from pipeline.common.errors import DONE

HELP = "index webdataset shards, once per data set or new split"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what is indexed, and how."""
    bind(parser, run)
    parser.add_argument("shards", help="directory, URL, or glob or brace pattern of shards")
    parser.add_argument("--out", type=Path, help="where the index goes; else beside the shards")
    parser.add_argument("--deep", action="store_true", help="with a checksum of every member")
    add_split(parser)
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Index shards."""
    from pipeline.data.index import build_index
    from pipeline.data.index.build import summary
    from pipeline.data.index.splits import read_split

    built = build_index(
        arguments.shards,
        out=arguments.out,
        split=read_split(arguments.split),
        deep=arguments.deep,
        workers=arguments.workers,
        progress=progress,
    )
    print_report(summary(built), arguments.json)
    return DONE
