"""W&B's offline pieces, as W&B's own `wandb leet inspect` reads them."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import wandb
from wandb.util import get_core_path

Row = dict[str, Any]


def pieces(root: Path) -> list[Path]:
    """The folders of the offline pieces in a folder `wandb`, in the order of their starts."""
    wandb.teardown()  # this process's wandb-core may still write
    return sorted(root.glob("offline-run-*"))


def records(piece: Path) -> list[Row]:
    """All records of a piece."""
    [file] = piece.glob("*.wandb")
    argv = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    done = subprocess.run([*argv, file, piece.parent], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_of(piece: Path) -> Row:
    """What a piece says about its run: id, project, config ..."""
    return next(record["run"] for record in records(piece) if record["type"] == "run")


def history(piece: Path) -> dict[int, Row]:
    """The values of a piece, step by step; each step may stand there once."""
    found = [record["history"] for record in records(piece) if record["type"] == "history"]
    steps = [row["step"]["num"] for row in found]
    assert len(set(steps)) == len(steps)
    rows = {row["step"]["num"]: row["item"] for row in found}
    for step, row in rows.items():
        assert row["_step"] == step
    return {step: {k: v for k, v in row.items() if k[0] != "_"} for step, row in rows.items()}


def summary(piece: Path) -> Row:
    """The last value of everything that is summarised."""
    values: Row = {}
    for record in records(piece):
        if record["type"] == "summary":
            values |= record["summary"]["update"]
    return values


def logged(run_dir: Path) -> dict[int, Row]:
    """The values of metrics.jsonl, step by step."""
    rows: dict[int, Row] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        row = rows.setdefault(record.pop("step"), {})
        del record["time"]
        row |= record
    return rows


def assert_whole(run_dir: Path, piece: Path) -> None:
    """Fail unless a piece has every step of metrics.jsonl once, and the pictures of images/."""
    rows, expected = history(piece), logged(run_dir)
    assert list(rows) == list(expected)
    pictures: set[tuple[str, int]] = set()
    for step, row in rows.items():
        numbers = {name: value for name, value in row.items() if not name.startswith("images/")}
        assert numbers.keys() == expected[step].keys()
        for name, value in numbers.items():
            found, wanted = float(value), expected[step][name]
            assert found == wanted or (math.isnan(found) and math.isnan(wanted)), (step, name)
        for name in row:
            if name.endswith(".path"):
                assert (piece / "files" / row[name]).is_file()
                pictures.add((name.removeprefix("images/").removesuffix(".path"), step))
    files = [path.stem.rpartition("-") for path in (run_dir / "images").glob("*.png")]
    assert pictures == {(name, int(step)) for name, _, step in files}
