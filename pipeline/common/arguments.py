"""Arguments of command lines: their types, and those that several commands share.

Imports nothing heavy: `--help` answers without torch.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.common.files import local_directory
from pipeline.common.shipped import Kind, find, shipped

Run = Callable[[argparse.Namespace], int]  # what a verb does; returns the exit code
Parts = Any  # what `add_subparsers` returns; argparse keeps its type private

OVERRIDE = re.compile(r"(--)?[A-Za-z_][\w.]*=")  # W&B's sweeps write --a.b=c
BINARY_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


def size(text: str) -> int:
    """Bytes from 123, 64K, 256M, 2G (binary units, also written 256MiB)."""
    number, unit = text.removesuffix("iB"), 0
    if number and number[-1] in BINARY_UNITS:
        number, unit = number[:-1], BINARY_UNITS[number[-1]]
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 1000000, 64K, 256M or 2G")
    return int(number) << unit


def pixels(text: str) -> int | tuple[int, int]:
    """Pixels of a picture's sides: 256, or 256x384 for height and width."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size of pictures: write 256, or 256x384 (height x width)"
        )
    height, width = int(sides[0]), int(sides[-1])
    return height if height == width else (height, width)


def numbers(text: str) -> list[int]:
    """Numbers of at least 1 from 4 or 1,2,4."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers: write 4, or 1,2,4 for several")
    return [int(part) for part in parts]


def count(text: str) -> int | Literal["auto"]:
    """How many: a number, or auto."""
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number: write 1 or more, or auto")
    return int(text)


def number_or_all(text: str) -> int | Literal["all"]:
    """How many of them: a number of at least 1, or all."""
    if text == "all":
        return "all"
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number: write 1 or more, or all")
    return int(text)


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


def directory(what: str) -> Callable[[str], Path]:
    """The type of an argument, called `what`, that names a directory where no URL works."""
    return partial(local_directory, what=what)


def settings_file(kind: Kind) -> Callable[[str], Path]:
    """The type of an argument that names settings: a file, or the name of shipped ones."""
    return partial(find, kind)


def add_config(parser: argparse.ArgumentParser, kind: Kind) -> None:
    """Add the config of a training or an export, and what is set otherwise than in it."""
    names = ", ".join(shipped(kind))
    text = f"YAML file, or shipped settings: {names}"
    parser.add_argument("config", type=settings_file(kind), metavar="CONFIG", help=text)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that override the file's"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add how many processes are to run on this machine, and on what."""
    text = "one per GPU, or N (auto: all GPUs; without any, 1 process)"
    parser.add_argument("--processes", type=count, default="auto", metavar="N|auto", help=text)
    text = "what computes (auto: the GPUs; without any, the CPU)"
    parser.add_argument("--device", choices=["cpu", "gpu", "auto"], default="auto", help=text)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pipeline.export` and `latentmill export run`."""
    add_config(parser, "export")
    parser.add_argument("--worker", metavar="i/n", help="be worker i (from 0) of n")
    parser.add_argument("--retry-failed", action="store_true", help="try failed tasks again")
    add_dry_run(parser, "print the plan, and write nothing")


def add_accept_change(parser: argparse.ArgumentParser) -> None:
    """Add the option to go on with a run although a setting differs."""
    parser.add_argument(
        "--accept-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="resume although this setting differs from the run's; recorded",
    )


def add_dry_run(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the option to show what would be done, and to do nothing."""
    parser.add_argument("--dry-run", action="store_true", help=text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; overrides, a.b=c or --a.b=c, may stand anywhere behind the config."""
    arguments, rest = parser.parse_known_args(argv)
    takes_overrides = hasattr(arguments, "overrides")
    unknown = [text for text in rest if not (takes_overrides and OVERRIDE.match(text))]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def parse_train(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of `pipeline.train`; UserError for a config that is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train",
        description="Train, or resume the training that config and run_dir name.",
    )
    add_config(parser, "train")
    add_dry_run(parser, "print the resolved config and its sizes, and write nothing")
    text = "the checks of --dry-run, without its sizes, which take seconds: print mistakes only"
    parser.add_argument("--check", action="store_true", help=text)
    add_accept_change(parser)
    return parse(parser, argv)
