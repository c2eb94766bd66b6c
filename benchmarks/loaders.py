"""Benchmark of our stream and other loaders on the same JPEG images: speed, exactness, resume.

    pictures.py --> each loader's own format, once --> a fresh process per measurement, interleaved
                --> table on stdout, everything in --json

    python -m benchmarks.loaders [--rivals-python /tmp/rivals/bin/python] [--check]

LitData and MosaicML streaming need other versions of torch and torchvision, so they have their own
environment (about 7 GB):

    python3.11 -m venv /tmp/rivals
    /tmp/rivals/bin/pip install torch==2.14.1 torchvision==0.29.1 mosaicml-streaming litdata \\
        datasets torchdata "huggingface-hub<1" simplejpeg pydantic opencv-python-headless pillow

A loader runs in the first Python that has its packages: this one, then `--rivals-python`. A loader
that runs in neither is listed with the reason. Adding a loader: see benchmarks/rivals/__init__.py.

Speed: images/s of a whole epoch, the second of its process (workers, files and code are warm), to a
batch in the training process; 2 threads or 2 worker processes with 1 thread each, shuffled. The
ceiling is 2 threads that decode the same bytes out of memory by simplejpeg, in the same rounds.
CPU us/image is the processor time of all the loader's processes: the figure for a busy machine.
Ranks: real processes with RANK, WORLD_SIZE and the like read the first size's pictures; every label
is counted. Resume: a new process continues in the middle of an epoch, with a cold page cache;
seconds and bytes off the disk to its first batch, without the imports of its file.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pictures import QUALITY, make_pictures, read_summary
from benchmarks.report import checks, print_tables
from benchmarks.rivals import CEILING, LABELS, OURS
from benchmarks.runs import MeasurementError, Runner

RANK_BATCH = 64
PARTS = ("speed", "ranks", "resume")
# Levels of 255 by which a picture's mean may differ from Pillow's decoding of it.
MEAN_TOLERANCE = 1.0
DEFAULT_SIZES = ((64, 20_000), (256, 4_000))


def _size_and_count(text: str) -> tuple[int, int]:
    try:
        size, count = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not SIZE:COUNT, such as 64:20000") from None
    if size < 8 or count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 8 pixels and 1 picture")
    return size, count


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.loaders", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", type=Path, default=Path("/tmp/latentmill-loaders"), help="cache of pictures")
    add("--pictures", type=_size_and_count, nargs="+", default=DEFAULT_SIZES, metavar="SIZE:COUNT")
    add("--seed", type=int, default=0, help="of the pictures and of every order")
    add("--rounds", type=_positive, default=5, help="interleaved runs of each; medians are shown")
    add("--batch", type=_positive, default=256)
    add("--workers", type=_positive, default=2, help="decoding threads, or worker processes")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    add("--worlds", type=_positive, nargs="+", default=(2, 3), help="numbers of ranks")
    add("--only", nargs="+", choices=LABELS, default=list(LABELS), help="loaders to measure")
    add("--rivals-python", type=Path, help="interpreter of the rivals' environment")
    add("--json", type=Path, help="write all figures to this file")
    add("--check", action="store_true", help="exit 1 unless the promised ratios hold")
    return parser.parse_args(argv)


def measure_speed(
    runner: Runner, names: list[str], rounds: int, **task: Any
) -> list[dict[str, Any]]:
    """Rows of loader x decoder: images/s of every round; the first row is the ceiling."""
    rows: list[dict[str, Any]] = [
        {"loader": name, "decoder": decoder, "runs": [], "cpu_us_runs": []}
        for name in names
        for decoder in runner.ready[name]["decoders"]
    ]
    for number in range(rounds):
        for row in rows:
            _say(f"{task['size']} px, round {number + 1}: {row['loader']}, {row['decoder']}")
            ours = row["decoder"] == "ours"
            try:
                result = runner.run(row["loader"], "speed", our_decoder=ours, **task)
            except MeasurementError as failure:
                row["failure"] = str(failure)
                continue
            row["runs"].append(result["images_per_second"])
            row["cpu_us_runs"].append(result["cpu_us"])
            row["batch"] = result["batch"]
    ceiling = rows[0]["runs"]
    for row in rows:
        complete = len(row["runs"]) == rounds
        row["images_per_second"] = median(row["runs"]) if complete else None
        shares = [run / top for run, top in zip(row["runs"], ceiling, strict=False)]
        row["share"] = median(shares) if complete else None
        row["cpu_us"] = median(row["cpu_us_runs"]) if complete else None
    return rows


def count_ids(ids: list[int], count: int) -> dict[str, int]:
    """Count samples that were delivered too often, and samples that were never delivered."""
    distinct = len(set(ids))
    return {"duplicates": len(ids) - distinct, "misses": count - distinct}


def measure_ranks(
    runner: Runner, name: str, means: list[float], world: int, **task: Any
) -> dict[str, Any]:
    """One epoch over `world` ranks: duplicates, misses, steps of each rank, wrong pixels."""
    _say(f"{task['size']} px: {name} over {world} ranks")
    try:
        results = runner.run_ranks(name, "ids", world, our_decoder=name == OURS, **task)
    except MeasurementError as failure:
        return {"failure": str(failure)}
    ids = [number for result in results for number in result["ids"]]
    found = [mean for result in results for mean in result["means"]]
    wrong = [
        number
        for number, mean in zip(ids, found, strict=True)
        if abs(mean - means[number]) > MEAN_TOLERANCE
    ]
    steps = [result["steps"] for result in results]
    return {**count_ids(ids, task["count"]), "steps": steps, "wrong_pixels": len(wrong)}


def measure_resume(runner: Runner, name: str, **task: Any) -> dict[str, Any]:
    """Stop in the middle of an epoch, go on in a new process until its end."""
    _say(f"{task['size']} px: {name} resumes")
    task |= {
        "stop_after": task["count"] // task["batch_size"] // 2,
        "state": str(runner.scratch / f"{name}.state"),
        "our_decoder": name == OURS,
    }
    try:
        stopped = runner.run(name, "stop", **task)
        resumed = runner.run(name, "resume", **task)
    except MeasurementError as failure:
        return {"failure": str(failure)}
    counts = count_ids(stopped["ids"] + resumed["ids"], task["count"])
    how = "state" if runner.ready[name]["has_state"] else "skip"
    return {"seconds": resumed["seconds"], "bytes": resumed["bytes"], "how": how, **counts}


def prepare(options: argparse.Namespace, runner: Runner, size: int, count: int) -> dict[str, Any]:
    """Write the pictures in every loader's format; return the task settings of this size."""
    folder = options.data / f"{size}px-{count}-seed{options.seed}"
    _say(f"{size} px: {count} pictures in {folder}")
    make_pictures(folder, size=size, count=count, seed=options.seed)
    task = {
        "pictures": str(folder),
        "count": count,
        "size": size,
        "batch_size": options.batch,
        "workers": options.workers,
        "seed": options.seed,
    }
    for name in [*options.only, *([CEILING] if "speed" in options.parts else [])]:
        runner.prepare(name, **task)
        if name in (OURS, CEILING) and name in runner.absent:
            sys.exit(f"Without {name} there is nothing to compare: {runner.absent[name]}")
    return task


def measure(
    options: argparse.Namespace, runner: Runner, task: dict[str, Any], parts: Sequence[str]
) -> dict[str, Any]:
    """Measure the parts with pictures of one size."""
    names = [name for name in options.only if name in runner.ready]
    summary = read_summary(Path(task["pictures"]))
    figures: dict[str, Any] = {"count": task["count"], "bytes": summary["bytes"]}
    if "speed" in parts:
        figures["speed"] = measure_speed(runner, [CEILING, *names], options.rounds, **task)
    if "ranks" in parts:
        small = task | {"batch_size": min(options.batch, RANK_BATCH)}
        figures["ranks"] = {
            name: {
                str(world): measure_ranks(runner, name, summary["means"], world, **small)
                for world in options.worlds
            }
            for name in names
        }
    if "resume" in parts:
        figures["resume"] = {name: measure_resume(runner, name, **task) for name in names}
    return figures


def measure_all(options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Prepare every size, then measure: ranks with the first size only."""
    tasks = [prepare(options, runner, size, count) for size, count in options.pictures]
    sizes: dict[str, Any] = {}
    for task in tasks:
        parts = [part for part in options.parts if part != "ranks" or task is tasks[0]]
        sizes[str(task["size"])] = measure(options, runner, task, parts)
    return sizes


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    options = parse(argv)
    options.data.mkdir(parents=True, exist_ok=True)
    pythons = [Path(sys.executable), *([options.rivals_python] if options.rivals_python else [])]
    with Runner(options.data, pythons) as runner:
        load_before = os.getloadavg()
        sizes = measure_all(options, runner)
        report = {
            "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
            "load_average": {"before": load_before, "after": os.getloadavg()},
            "settings": {
                "batch": options.batch,
                "workers": options.workers,
                "rounds": options.rounds,
                "seed": options.seed,
                "quality": QUALITY,
            },
            "versions": {name: loader["versions"] for name, loader in runner.ready.items()},
            "absent": runner.absent,
            "sizes": sizes,
        }
    report["checks"] = checks(report)
    print_tables(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if options.check and not all(check["holds"] for check in report["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
