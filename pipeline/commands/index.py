"""`latentmill index`: index webdataset shards."""

import argparse
from collections.abc import Mapping
from typing import Any

from pipeline.common.arguments import add_split, add_workers, bind
from pipeline.common.console import (
    NUM_NAMES_SHOWN,
    in_bytes,
    listing,
    named,
    plural,
    print_report,
    progress_line,
)
from pipeline.common.errors import DONE

HELP = "index webdataset shards, once per data set or new split"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shards, and how to index them."""
    bind(parser, run)
    parser.add_argument("shards", help="directory, URL, or glob or brace pattern of shards")
    parser.add_argument("--out", help="directory or URL of the index (default: beside the shards)")
    parser.add_argument("--deep", action="store_true", help="with a checksum of every member")
    add_split(parser)
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Index shards."""
    from pipeline.common import strict
    from pipeline.data.index import build_index
    from pipeline.data.index.build import summary
    from pipeline.data.index.left_out import folded
    from pipeline.data.index.splits import SplitSpec

    split = arguments.split
    with progress_line() as progress:
        built = build_index(
            arguments.shards,
            out=arguments.out,
            split=split and strict.load(SplitSpec, None, [], text=split),
            deep=arguments.deep,
            workers=arguments.workers,
            progress=progress,
        )
    losses = built.left_out_lines(only_losses=True)
    notes = [line for line in built.left_out_lines() if line not in losses]
    suffixes = _suffixes(None if built.suffixes is None else folded(built.suffixes))
    report = summary(built)
    print_report(report, arguments.json, _lines(report, suffixes, losses, notes))
    return DONE


def _lines(
    built: Mapping[str, Any], suffixes: str, losses: list[str], notes: list[str]
) -> list[str]:
    """The verdict, what was found, and the problems of the shards."""
    from pipeline.data.index.left_out import remedy_of_repeats

    num_duplicates, damage = built["num_duplicate_keys"], built["damage"]
    samples = plural(built["num_samples"], "sample")
    shards = f"{plural(built['num_shards'], 'shard')}, {in_bytes(built['num_bytes'])}"
    duplicates = [
        f"{key} in {', '.join(dict.fromkeys(shards))}" for key, *shards in built["duplicate_keys"]
    ]
    return [
        f"{'WARN' if damage or num_duplicates or losses else 'OK'}  {samples} in {shards}",
        *listing(
            {
                "index": str(built["index"]),
                "splits": named(built["num_samples_per_split"]),
                "members per suffix": suffixes,
                "data set id": built["dataset_id"],
                f"{plural(num_duplicates, 'sample')} with the key of an earlier one": [
                    *duplicates,
                    *([remedy_of_repeats(built["duplicate_keys"])] if duplicates else []),
                ],
                "damage": damage,
                "left out, or not as meant": losses,
                "besides": notes,
            }
        ),
    ]


def _suffixes(counts: dict[str, int] | None) -> str:
    """Members per suffix, the most frequent first."""
    if counts is None:
        return "very many suffixes: names hold more than one dot"
    more = len(counts) - NUM_NAMES_SHOWN
    shown = named(dict(list(counts.items())[:NUM_NAMES_SHOWN]))
    return f"{shown} and {more:,} more" if more > 0 else shown
