"""`latentmill bench WHAT`: measure the data path, the training loop, its saves, or the export."""

import argparse
from dataclasses import asdict

from pipeline.common.arguments import add_config, add_part
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "measure the data path, a training or an export against the limit of this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is measured, and for how long."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    parsers = {
        kind: add_part(kinds, kind, run, text)
        for kind, text in (
            ("data", "the stream beside raw reading and decoding"),
            ("train", "the training beside a bare loop in memory"),
            ("export", "the export beside decoding and encoding alone"),
        )
    }
    for kind, part in parsers.items():
        add_config(part, "export" if kind == "export" else "train")
        part.add_argument("--rounds", type=int, default=5, help="after a warm-up (%(default)s)")
        part.set_defaults(kind=kind)
    parsers["data"].add_argument(
        "--images", type=int, default=16_384, help="per round (%(default)s)"
    )
    parsers["export"].add_argument(
        "--processes", type=int, help="default: one per GPU; without any, one per core"
    )
    train = parsers["train"]
    train.add_argument("--steps", type=int, default=20, help="per round (%(default)s)")
    train.add_argument(
        "--checkpoint",
        action="store_true",
        help="measure saving instead: its time, and the training's wait",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print rates and shares."""
    from pipeline.commands.bench.checkpoint import bench_checkpoint
    from pipeline.commands.bench.data import bench_data
    from pipeline.commands.bench.export import bench_export
    from pipeline.commands.bench.train import bench_train
    from pipeline.common import strict
    from pipeline.config import read_config
    from pipeline.export.settings import ExportConfig

    rounds = arguments.rounds
    if arguments.kind == "export":
        exported = strict.load(ExportConfig, arguments.config, arguments.overrides)
        result = bench_export(exported, processes=arguments.processes, rounds=rounds)
        print_report(asdict(result), arguments.json, result.lines())
        return DONE
    config = read_config(arguments.config, arguments.overrides)
    if arguments.kind == "data":
        result = bench_data(config, num_images=arguments.images, rounds=rounds)
    else:
        measure = bench_checkpoint if arguments.checkpoint else bench_train
        result = measure(config, num_steps=arguments.steps, rounds=rounds)
    print_report(asdict(result), arguments.json, result.lines())
    return DONE
