"""`latentmill order`: which rank reads which sample, or the cost of an order."""

import argparse
import json
from dataclasses import asdict, fields

from pipeline.common.arguments import bind, numbers, size, steps
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "which rank reads which sample; --simulate: the cost of orders; --example: a drawing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source, the steps, and the numbers that override the config's."""
    bind(parser, run)
    parser.add_argument("source", nargs="?", help="config or its shipped name, or index")
    parser.add_argument("overrides", nargs="*", help="settings of the config as a.b=c")
    parser.add_argument("--steps", type=steps, default=range(1), metavar="A:B", help="(0:1)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--simulate", action="store_true", help="a table, planned on counts alone")
    ways.add_argument("--example", action="store_true", help="draw a small order, step by step")
    several = "; several, as 1,2,4, for a table"
    for option, what in (
        ("--world-size", "processes R"),
        ("--lanes", "L"),
        ("--interleave", "K, shards that a lane reads at a time"),
        ("--window", "S, samples per shuffled window"),
    ):
        parser.add_argument(option, type=numbers, metavar="N,...", help=what + several)
    parser.add_argument("--batch-size", type=int, help="G, over all processes")
    parser.add_argument("--seed", type=int, help="else the config's, or 0")
    parser.add_argument("--split", metavar="NAME", help="else the config's, or all")
    counts = parser.add_argument_group(
        "equal shards that need not exist, for --simulate and --example"
    )
    counts.add_argument("--shards", type=int, help="how many")
    counts.add_argument("--samples-per-shard", type=int, help="(1000; --example: 4)")
    counts.add_argument("--mean-bytes", type=size, default=115_000, help="per sample (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Print assignments, with --simulate the table, or with --example the drawing."""
    from pipeline.commands.order.example import draw, example_of
    from pipeline.commands.order.plan import Request, assignments, simulation

    request = Request(**{field.name: getattr(arguments, field.name) for field in fields(Request)})
    if arguments.example:
        drawing = draw(example_of(request))
        if arguments.json:
            print_report({"text": drawing}, as_json=True)
        else:
            print(drawing)
        return DONE
    if not arguments.simulate:
        for line in assignments(request, arguments.steps):
            print(json.dumps(line))
        return DONE
    report = simulation(request)
    if arguments.json:
        print_report(asdict(report), as_json=True)
    else:
        print(report.text())
    return DONE
