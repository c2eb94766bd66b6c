"""What commands print and read: reports, tables, sizes, warnings; imports nothing heavy."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

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


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _lines(fields: dict[str, Any], indent: str = "") -> list[str]:
    """The fields one a line; nested mappings and long lists below their name."""
    lines: list[str] = []
    for name, value in fields.items():
        # Metrics (eval_ema/kl) keep the names under which they are logged.
        label = indent + (name if "/" in name else name.replace("_", " "))
        if isinstance(value, dict) and value:
            lines += [label, *_lines(value, indent + "  ")]
        elif isinstance(value, list | tuple) and len(value) > 4:
            lines += [label, *(f"{indent}  {item}" for item in value)]
        elif isinstance(value, list | tuple | dict):
            lines.append(f"{label:<28}{', '.join(map(str, value)) or '-'}")
        elif isinstance(value, float):
            lines.append(f"{label:<28}{value:.6g}")
        else:
            lines.append(f"{label:<28}{value}")
    return lines


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def print_report(fields: dict[str, Any], as_json: bool) -> None:
    """Print the fields of a report on stdout: aligned text, or one JSON object."""
    if as_json:
        # JSON has no NaN: a mean over nothing is null.
        finite = {name: None if _is_nan(value) else value for name, value in fields.items()}
        print(json.dumps(finite, default=str, allow_nan=False))
    else:
        print("\n".join(_lines(fields)))


def print_scores(scores: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print the scores of a probe on stdout."""
    if as_json:
        print_report({"scores": list(scores)}, as_json=True)
    else:
        print("\n".join(_score_lines(scores)))


def _score_lines(scores: Sequence[dict[str, Any]]) -> list[str]:
    """The scores of a probe, a line each: accuracy for classes, R2 for numbers."""
    names = ("target", "features", "score", "linear", "neighbours", "chance")
    lines = ["{:<16}{:<10}{:<10}{:>8}{:>12}{:>8}".format(*names)]
    for score in scores:
        unit = "accuracy" if score["kind"] == "class" else "R2"
        lines.append(
            f"{score['target']:<16}{score['features']:<10}{unit:<10}"
            f"{score['linear']:8.3f}{score['neighbours']:12.3f}{score['chance']:8.3f}"
        )
    return [*lines, "trained on {num_train:,} samples, tested on {num_test:,}".format(**scores[0])]
