"""`latentmill evaluate`: evaluate a run's checkpoint, or the model of a folder."""

import argparse
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.common.arguments import bind, directory, number_or_all, pixels, step
from pipeline.common.console import LABEL_WIDTH, listing, plural, print_report
from pipeline.common.errors import DONE, UserError

if TYPE_CHECKING:  # imports torch
    from pipeline.evaluation.card import Card

HELP = "evaluate a run's checkpoint, or the model of a folder"
# Options, and how messages call what each of them sets.
AS_TYPED = {
    "split": r"\b(evaluation|data)\.split(?= = )",
    "metrics": r"\bevaluation\.metrics\b",
    "size": r"(?<=\()data\.decode\.size(?=\))",
}
METRICS = "instead of the config's: kinds, as psnr ssim, or settings, as '{kind: psnr, ...}'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the data, and what is measured."""
    bind(parser, run)
    text = "run directory; or a model's folder, of export-model, import-model or diffusers"
    parser.add_argument("run", type=directory("RUN"), metavar="RUN|FOLDER", help=text)
    parser.add_argument(
        "--step", type=step, help="step of a run's checkpoint, or `best` (default: newest)"
    )
    text = "of the run's training data, or of --data: a name, or a pattern of shards, as 'val-*' "
    text += "(default: what the config evaluates; of other data: all)"
    parser.add_argument("--split", metavar="NAME|PATTERN", help=text)
    text = "of the pictures, for fully convolutional models: 256, or 256x384 (height x width)"
    parser.add_argument("--size", type=pixels, help=text)
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help=METRICS)
    text = "of each data set at most so many samples, always the same (default: the config's)"
    parser.add_argument("--max-samples", type=number_or_all, metavar="N|all", help=text)
    text = "folder for card and pictures (default: in RUN/evaluations; of a FOLDER: none)"
    parser.add_argument("--out", type=directory("--out"), help=text)
    again = "; of the run's own mixture once for each of its data sets, in their order"
    for option, metavar, what in (
        ("--data", "PATH", "directory or URL of the index of another data set, or of the run's"),
        ("--shards", "PATH", "directory or URL of the shards, if not beside the index"),
    ):
        parser.add_argument(option, action="append", default=[], metavar=metavar, help=what + again)
    parser.epilog = "A run finds its data by its id, also moved; a FOLDER needs --data."


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write the card of a run, and print the figures by the names that training logs."""
    try:
        card = _evaluated(arguments)
    except UserError as error:
        raise UserError(_as_typed(str(error), arguments)) from None
    if os.environ.get("RANK", "0") == "0":  # one of several processes
        print_report(card.content(), arguments.json, _lines(card))
    return DONE


def _evaluated(arguments: argparse.Namespace) -> "Card":
    """Evaluate what the arguments name; raises UserError."""
    from pipeline.evaluation.folder import evaluate_folder
    from pipeline.evaluation.request import EvaluationRequest, read_metrics
    from pipeline.evaluation.trained import evaluate_run

    request = EvaluationRequest(
        split=arguments.split,
        metrics=None if arguments.metrics is None else read_metrics(arguments.metrics),
        max_samples=arguments.max_samples,
        size=arguments.size,
    )
    where, data, shards = arguments.run, arguments.data, arguments.shards
    settings: dict[str, Any] = {"request": request, "data": data, "shards": shards}
    if (where / "config.yaml").is_file():
        return evaluate_run(where, step=arguments.step, out=arguments.out, **settings)
    if arguments.step is not None:
        raise UserError(f"--step chooses a checkpoint, and {where} is no run: leave it out.")
    return evaluate_folder(where, out=arguments.out, **settings)


def _as_typed(text: str, arguments: argparse.Namespace) -> str:
    """Return a message that names the options that were typed, not the settings they replace."""
    for option, setting in AS_TYPED.items():
        if getattr(arguments, option) is not None:
            text = re.sub(setting, f"--{option}", text)
    return text


def _lines(card: "Card") -> list[str]:
    """The figures with their units, by the names that training logs; the verdict first."""
    model = card.model.get("folder", "")
    at = model if card.step is None else f"{model}{', ' * bool(model)}step {card.step:,}"
    sets = [
        f"{_named(one)}split {one['split']} of {one['path']}: "
        f"{_chosen(one['samples'], one['split_samples'])}"
        for one in card.identity.data
    ]
    averaged = any(name.startswith("eval_ema/") for name in card.figures)
    weights = "eval: weights as trained; eval_ema: averaged ones" if averaged else ""
    also = {
        "notes": list(card.notes),
        "evaluation id": card.identity.evaluation_id,
        "card and pictures": str(card.folder or ""),
    }
    shown = {n: v for n, v in card.figures.items() if not n.endswith("/samples")}
    width = max(LABEL_WIDTH, 2 + max(map(len, shown)))
    figures = [f"{n:<{width}}{v:<12,.5g}{card.unit(n)}".rstrip() for n, v in shown.items()]
    verdict = f"{at} on {'; '.join(sets)}, each once"
    return [verdict, *listing({"weights": weights}), *figures, *listing(also)]


def _chosen(samples: int, of: int) -> str:
    """Say how many samples of a split were evaluated."""
    return plural(samples, "sample") if samples == of else f"{samples:,} of {plural(of, 'sample')}"


def _named(data: Mapping[str, Any]) -> str:
    return f"{data['name']}, " if "name" in data else ""
