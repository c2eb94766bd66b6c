"""`latentmill index`: index webdataset shards."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.common.arguments import add_split, add_workers, bind
from pipeline.common.console import in_bytes, listing, named, plural, print_report, progress
from pipeline.common.errors import DONE

HELP = "index webdataset shards, once per data set or new split"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shards, and how to index them."""
    bind(parser, run)
    parser.add_argument("shards", help="directory, URL, or glob or brace pattern of shards")
    parser.add_argument(
        "--out", type=Path, help="directory of the index (default: beside the shards)"
    )
    parser.add_argument("--deep", action="store_true", help="with a checksum of every member")
    add_split(parser)
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Index shards."""
    from pipeline.common import strict
    from pipeline.data.index import build_index
    from pipeline.data.index.build import summary
    from pipeline.data.index.splits import SplitSpec

    split = arguments.split
    built = build_index(
        arguments.shards,
        out=arguments.out,
        split=split and strict.load(SplitSpec, None, [], text=split),
        deep=arguments.deep,
        workers=arguments.workers,
        progress=progress,
    )
    print_report(summary(built), arguments.json, _lines(summary(built)))
    return DONE


def _lines(built: Mapping[str, Any]) -> list[str]:
    """The verdict, and the problems of the shards."""
    num_duplicates, damage = built["num_duplicate_keys"], built["damage"]
    samples = plural(built["num_samples"], "sample")
    shards = f"{plural(built['num_shards'], 'shard')}, {in_bytes(built['num_bytes'])}"
    duplicates = [f"{key} in {', '.join(shards)}" for key, *shards in built["duplicate_keys"]]
    return [
        f"{'WARN' if damage or num_duplicates else 'OK'}  {samples} in {shards}",
        *listing(
            {
                "index": str(built["index"]),
                "splits": named(built["num_samples_per_split"]),
                "data set id": built["dataset_id"],
                f"{plural(num_duplicates, 'key')} of an earlier sample": duplicates,
                "damage, whose samples are left out": damage,
            }
        ),
    ]
