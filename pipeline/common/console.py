"""What commands print: reports, tables, warnings; imports nothing heavy."""

import json
import math
import sys
from typing import Any


def progress(line: str) -> None:
    """Print how far a command is, on stderr."""
    print(line, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _lines(fields: dict[str, Any], indent: str = "") -> list[str]:
    """Return one line per field; nested mappings and long lists follow below their name."""
    lines: list[str] = []
    for name, value in fields.items():
        # Metrics (eval_ema/kl) keep their logged names.
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
