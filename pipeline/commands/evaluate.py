"""`latentmill evaluate`: evaluate a run's checkpoint on held-out data."""

import argparse
from collections.abc import Mapping

from pipeline.common.arguments import bind, directory, pixels, step
from pipeline.common.console import listing, plural, print_report
from pipeline.common.errors import DONE

HELP = "evaluate a run's checkpoint on held-out data"

UNITS = {
    "loss": "per image: the training objective",
    "nats": "nats/image: at least -ln p(x)",
    "kl": "nats/image",
    "bits_per_dimension": "bits per value of an image",
    "squared_error": "squared error/image: summed over its values in [0, 1]",
    "sigma2": "the likelihood's variance",
    "tombstones": "unusable samples",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the split, the size of the pictures, and the places of the data."""
    bind(parser, run)
    parser.add_argument("run", type=directory("RUN"), help="run directory")
    parser.add_argument(
        "--step", type=step, help="step of the checkpoint, or `best` (default: newest)"
    )
    parser.add_argument("--split", help="of the data (default: the config's held-out split)")
    text = "of the pictures, for fully convolutional models: 256, or 256x384 (height x width)"
    parser.add_argument("--size", type=pixels, help=text)
    again = "; of a mixture once for each of its data sets, in their order"
    for option, metavar, what in (
        ("--data", "PATH", f"directory or URL of the index of the run's data set{again}"),
        ("--shards", "PATH", f"directory or URL of the shards, if not beside the index{again}"),
    ):
        parser.add_argument(option, action="append", default=[], metavar=metavar, help=what)
    parser.epilog = "Data that has moved is looked for by its id, so --data is rarely needed."


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print the metrics by the names that training logs."""
    from pipeline.evaluation.trained import evaluate_run
    from pipeline.training.loading import load_config

    metrics = evaluate_run(
        arguments.run,
        step=arguments.step,
        split=arguments.split,
        size=arguments.size,
        data=arguments.data,
        shards=arguments.shards,
    )
    config = load_config(arguments.run)
    split = arguments.split or config.evaluation.split
    lines = _lines(metrics, split, in_nats=config.model.likelihood.is_nats)
    print_report(dict(metrics), arguments.json, lines)
    return DONE


def _lines(metrics: Mapping[str, float], split: str, *, in_nats: bool) -> list[str]:
    """The metrics with their units, by the names that training logs."""
    samples = plural(int(metrics["eval/samples"]), "sample")
    averaged = "eval_ema/loss" in metrics
    weights = "eval: weights as trained; eval_ema: averaged ones" if averaged else ""
    lines = [f"step {metrics['step']:,} on split {split}: {samples}, each once"]
    units = UNITS | {"distortion": "nats/image" if in_nats else "squared error/image"}
    shown = {
        name: f"{value:,.5g}  {units.get(name.partition('/')[2], 'per image')}".rstrip()
        for name, value in metrics.items()
        if name != "step" and not name.endswith("/samples")
    }
    return [*lines, *listing({"weights": weights, **shown})]
