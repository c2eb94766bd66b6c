"""Arguments of command lines: their types, and those that several commands share.

Imports nothing heavy: `--help` answers without torch.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

Run = Callable[[argparse.Namespace], int]  # what a verb does; returns the exit code
Parts = Any  # what `add_subparsers` returns; argparse keeps its type private

BINARY_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


def size(text: str) -> int:
    """Bytes from 123, 64K, 256M, 2G (binary units, also written 256MiB)."""
    number, unit = text.removesuffix("iB"), 0
    if number and number[-1] in BINARY_UNITS:
        number, unit = number[:-1], BINARY_UNITS[number[-1]]
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 1000000, 64K, 256M or 2G")
    return int(number) << unit


def numbers(text: str) -> list[int]:
    """Numbers of at least 1 from 4 or 1,2,4."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers: write 4, or 1,2,4 for several")
    return [int(part) for part in parts]


def step(text: str) -> int | Literal["best"]:
    """Which checkpoint: 1000, or best."""
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no checkpoint: write its step, or best")
    return int(text)


def steps(text: str) -> range:
    """A range of steps from 3:7 (3 to 6)."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal()) or int(first) >= int(end):
        raise argparse.ArgumentTypeError(f"{text!r} are no steps: write 3:7 for steps 3 to 6")
    return range(int(first), int(end))


def sentence(text: str) -> str:
    """Return a verb's help as its description: a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def bind(parser: argparse.ArgumentParser, run: Run) -> None:
    """Let a verb, or a part of one, call `run`; add the options of every verb."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(call=run)


def add_part(parts: Parts, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """Add a part of a verb, such as `bench data`, that calls `run`."""
    parser: argparse.ArgumentParser = parts.add_parser(name, help=text, description=sentence(text))
    bind(parser, run)
    return parser


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add the rule of splits for data that is indexed."""
    example = "{by: key, fractions: {train: 0.98, held_out: 0.02}, seed: 0}"
    parser.add_argument("--split", metavar="YAML", help=f"which samples are held out: {example}")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the number of worker processes."""
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="processes (%(default)s)")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pipeline.export` and `latentmill export run`."""
    parser.add_argument("config", type=Path, help="YAML file, see configs/export/")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that override the file's"
    )
    parser.add_argument("--worker", metavar="i/n", help="be worker i (from 0) of n")
    parser.add_argument("--retry-failed", action="store_true", help="try failed tasks again")


def parse_train(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of `pipeline.train`; overrides contain an equals sign."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train",
        description="Train, or resume the training that config and run_dir name.",
    )
    parser.add_argument("config", type=Path, help="YAML file, see configs/train/")
    parser.add_argument("overrides", nargs="*", help="settings as a.b=c (or --a.b=c)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and its sizes, and exit"
    )
    parser.add_argument(
        "--accept-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="resume although this setting differs from the run's; recorded",
    )
    is_override = re.compile(r"--[\w.]+\.[\w.]*=|--\w+=")
    argv = [
        a.removeprefix("--") if is_override.match(a) and not a.startswith("--accept-change") else a
        for a in argv
    ]
    return parser.parse_intermixed_args(argv)
