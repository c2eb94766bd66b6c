"""`latentmill probe`: what can be read off exported latents."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.common.arguments import bind
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "what can be read off exported latents: a linear probe and nearest neighbours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which export, and which targets."""
    bind(parser, run)
    parser.add_argument("export", type=Path, help="directory of a finished export")
    parser.add_argument("--source", type=Path, help="its data set: probes raw pixels, too")
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="`label` or a field of the samples' JSON, several times; else all that fit",
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
    names = ("target", "features", "score", "linear", "neighbours", "chance")
    lines = ["{:<16}{:<10}{:<10}{:>8}{:>12}{:>8}".format(*names)]
    for score in scores:
        unit = "accuracy" if score["kind"] == "class" else "R2"
        lines.append(
            f"{score['target']:<16}{score['features']:<10}{unit:<10}"
            f"{score['linear']:8.3f}{score['neighbours']:12.3f}{score['chance']:8.3f}"
        )
    return [*lines, "trained on {num_train:,} samples, tested on {num_test:,}".format(**scores[0])]
