"""`latentmill probe`: how well exported latents predict labels and numbers."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.common.arguments import bind, directory
from pipeline.common.console import print_report, table
from pipeline.common.errors import DONE

HELP = "score exported latents by a linear probe and nearest neighbours"

UNITS = {"class": "accuracy", "number": "R2"}
MEANING = {
    "accuracy": "accuracy: share of samples classified correctly; chance: the most frequent class",
    "R2": "R2: share of the variance explained; predicting the mean scores 0",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the export, and the targets."""
    bind(parser, run)
    text = "directory of a finished export"
    parser.add_argument("export", type=directory("EXPORT"), help=text)
    text = "directory or URL of its data set: also probe raw pixels"
    parser.add_argument("--source", help=text)
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="`label` or a field of the samples' JSON; repeatable (default: all)",
    )
    parser.add_argument("--max-samples", type=int, default=8000, help="(%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Probe, and print the scores."""
    from pipeline.evaluation.exported import probe_export

    scores = [
        asdict(score)
        for score in probe_export(
            arguments.export,
            source=arguments.source,
            targets=arguments.target,
            max_samples=arguments.max_samples,
        )
    ]
    if arguments.json:
        print_report({"scores": scores}, as_json=True)
    else:
        print("\n".join(_lines(scores)))
    return DONE


def _lines(scores: Sequence[dict[str, Any]]) -> list[str]:
    """The scores, a line each: accuracy for classes, R2 for numbers."""
    rows = [
        (
            score["target"],
            score["features"],
            UNITS[score["kind"]],
            *(f"{score[name]:.3f}" for name in ("linear", "neighbours", "chance")),
        )
        for score in scores
    ]
    units = {UNITS[score["kind"]] for score in scores}
    return [
        "probed on {num_train:,} samples, tested on {num_test:,} others".format(**scores[0]),
        *table(("target", "features", "score", "linear", "neighbours", "chance"), rows),
        *(MEANING[unit] for unit in UNITS.values() if unit in units),
    ]
