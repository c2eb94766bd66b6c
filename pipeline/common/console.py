"""What commands print: reports, tables, warnings; imports nothing heavy.

A report for a person is a list of lines. The first is the verdict: what is there, and whether all
is well. `listing` and `table` make the others.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

LABEL_WIDTH = 28
NUM_NAMES_SHOWN = 20  # of a long list, in its line
# Between two lines of progress: in a log, and on a terminal, where each takes the other's place.
LOG_SECONDS, TERMINAL_SECONDS = 5.0, 0.1


def progress(line: str) -> None:
    """Print how far a command is, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress_line() -> Generator[Callable[[str, bool], None]]:
    """Show on stderr how far a long pass is: by one line that is rewritten, or some in a log.

    Yields a function that takes a line, and whether it is the last one of its pass.
    """
    stream = sys.stderr
    is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    shown_at, is_open = -math.inf, False

    def show(line: str, is_last: bool) -> None:
        nonlocal shown_at, is_open
        wait = TERMINAL_SECONDS if is_terminal else LOG_SECONDS
        if time.monotonic() < shown_at + wait and not is_last:
            return
        shown_at, is_open = time.monotonic(), is_terminal and not is_last
        if is_terminal:  # back to the first column, and clear the line
            line = f"\r\x1b[K{line[: os.get_terminal_size(stream.fileno()).columns - 1]}"
        print(line, end="" if is_open else "\n", file=stream, flush=True)

    try:
        yield show
    finally:
        if is_open:
            print(file=stream)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return a text whose line breaks and control characters, as names may hold, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plural(count: int, noun: str) -> str:
    """Return 1 row, 944 rows, 2 batches."""
    ending = "" if count == 1 else "es" if noun.endswith(("ch", "ss", "sh")) else "s"
    return f"{count:,} {noun}{ending}"


def in_bytes(count: float) -> str:
    """Return bytes in the unit that reads well."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def in_seconds(seconds: float) -> str:
    """Return seconds, or milliseconds, in three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def named(values: Mapping[str, int]) -> str:
    """Return counts by their names in one line: held_out 10, train 490."""
    return ", ".join(f"{name} {count:,}" for name, count in values.items())


def names(values: Sequence[str]) -> str:
    """Return a list of names in one line, with their number where there are several."""
    shown = ", ".join(values[:NUM_NAMES_SHOWN])
    more = len(values) - NUM_NAMES_SHOWN
    shown += f" and {more:,} more" if more > 0 else ""
    return f"{len(values)}: {shown}" if len(values) > 1 else shown


def listing(fields: Mapping[str, Any]) -> list[str]:
    """Return the fields one a line; lists of lines below their name; what is empty is left out.

    No value begins a line of its own: see `printable`.
    """
    lines: list[str] = []
    for name, value in fields.items():
        if value is None or value in ("", (), [], {}):
            continue
        if isinstance(value, dict):
            lines += [name, *(f"  {line}" for line in listing(value))]
        elif isinstance(value, list):
            lines += [name, *(f"  {printable(str(line))}" for line in value)]
        else:
            lines.append(f"{name:<{LABEL_WIDTH}}{printable(_text(value))}")
    return lines


def _text(value: Any) -> str:
    """Return a value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of columns: the first one aligned to the left, the others to the right."""
    cells = [header, *rows]
    first, *widths = (max(len(row[column]) for row in cells) for column in range(len(header)))
    return [
        "  ".join(
            [f"{row[0]:<{first}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths, strict=True))]
        )
        for row in cells
    ]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def print_report(
    fields: Mapping[str, Any], as_json: bool, lines: Sequence[str] | None = None
) -> None:
    """Print a report on stdout: as one JSON object of the fields, or as the lines.

    lines: None for a report without more words than the fields' names.
    """
    if as_json:
        # JSON has no NaN: a mean over nothing is null.
        finite = {name: None if _is_nan(value) else value for name, value in fields.items()}
        print(json.dumps(finite, default=str, allow_nan=False))
    else:
        words = {name.replace("_", " "): value for name, value in fields.items()}
        print("\n".join(listing(words) if lines is None else lines))
