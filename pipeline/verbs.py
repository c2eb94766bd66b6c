"""The command line's verbs and their options: words only, nothing is imported to be run.

Each verb is bound to a function of `pipeline.__main__` of the same name.
"""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline import __version__
from pipeline.console import numbers, size, step, steps

Run = Callable[[argparse.Namespace], int]
AddParser = Callable[..., argparse.ArgumentParser]
Runs = Mapping[str, Run]  # by name

EPILOG = """\
Training and export run under accelerate, on any number of processes; the same command resumes:
  accelerate launch [...] -m pipeline.train  configs/train/vae.yaml       [a.b=c ...]
  accelerate launch [...] -m pipeline.export configs/export/parquet.yaml  [a.b=c ...]
`python -m launch local --help` starts several processes on one machine.

Exit codes: 0 done, 2 wrong use or input, 1 everything else.
"""
SPLIT = "{by: key, fractions: {train: 0.98, held_out: 0.02}, seed: 0}"
# pipeline.export.verify's
LEVELS = ("listing", "counts", "hashes", "keys", "statistics", "encode")


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="YAML", help=f"which samples are held out: {SPLIT}")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="processes (%(default)s)")


def _verb(add: AddParser, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A sub-command that runs `run`, with the options that every verb has."""
    parser = add(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(call=run)
    return parser


def _add_pack(add: AddParser, runs: Runs) -> None:
    text = "write images into webdataset shards, and index them"
    sources = add("pack", help=text, description=f"{text.capitalize()}.")
    kinds = sources.add_subparsers(required=True, metavar="SOURCE")

    folder = _verb(
        kinds.add_parser,
        "folder",
        runs["pack_folder"],
        "an image folder; sub-folders are the classes",
    )
    folder.add_argument("source", type=Path, help="directory with the images")
    folder.add_argument("out", help="directory or URL (s3://...) for the shards")
    folder.add_argument("--shard-bytes", type=size, default=256 << 20, help="at most (256M)")
    folder.add_argument("--shard-samples", type=int, default=10_000, help="at most (%(default)s)")
    folder.add_argument("--resize", type=int, metavar="PIXELS", help="shorter side; else as it is")
    folder.add_argument("--shuffle-seed", type=int, metavar="SEED", help="else sorted by path")
    sprites = _verb(
        kinds.add_parser, "sprites", runs["pack_sprites"], "the built-in sprites with known factors"
    )
    sprites.add_argument("out", help="directory or URL (s3://...) for the shards")
    sprites.add_argument("--count", type=int, default=10_000, help="images (%(default)s)")
    sprites.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    sprites.add_argument("--shard-samples", type=int, default=1_000, help="at most (%(default)s)")
    for parser in (folder, sprites):
        _add_split(parser)
        _add_workers(parser)


def _add_index(add: AddParser, runs: Runs) -> None:
    parser = _verb(
        add, "index", runs["index"], "index webdataset shards, once per data set or new split"
    )
    parser.add_argument("shards", help="directory, URL, or glob or brace pattern of shards")
    parser.add_argument("--out", type=Path, help="where the index goes; else beside the shards")
    parser.add_argument("--deep", action="store_true", help="with a checksum of every member")
    _add_split(parser)
    _add_workers(parser)


def _add_verify(add: AddParser, runs: Runs) -> None:
    text = "check an export, or shards against their index; exit 1 if anything is wrong"
    parser = _verb(add, "verify", runs["verify"], text)
    parser.add_argument("path", help="directory or URL of the export, or of the index")
    parser.add_argument("--source", help="index of an export's data, to compare keys")
    parser.add_argument("--shards", help="where the shards lie, also a URL; else beside the index")
    parser.add_argument("--decode", action="store_true", help="shards: decode every image, too")
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help="that decode (%(default)s)")
    parser.add_argument("--level", choices=LEVELS, help="how deep, for an export (statistics)")
    parser.add_argument("--run", help="run directory of an export's model: level encode")
    parser.add_argument("--tasks", type=int, default=2, help="encoded anew there (%(default)s)")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `pipeline.export` and `latentmill export run` are told."""
    parser.add_argument("config", type=Path, help="YAML file, see configs/export/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings in place of its")
    parser.add_argument("--worker", metavar="i/n", help="be worker i (from 0) of n")
    parser.add_argument(
        "--retry-failed", action="store_true", help="let tasks out of quarantine before"
    )


def _add_export(add: AddParser, runs: Runs) -> None:
    text = "the latents of a whole data set: plan, run, look after, finish and check an export"
    parts = add("export", help=text, description=f"{text.capitalize()}.")
    kinds = parts.add_subparsers(required=True, metavar="PART")
    plan = _verb(kinds.add_parser, "plan", runs["export_plan"], "write the plan, and do no more")
    plan.add_argument("config", type=Path, help="YAML file, see configs/export/")
    plan.add_argument("overrides", nargs="*", help="settings as a.b=c")
    run = _verb(
        kinds.add_parser,
        "run",
        runs["export_run"],
        "export as one process, without a launcher; several may be started, anywhere, any time",
    )
    add_export_arguments(run)
    for name, what in (
        ("status", "how far an export is, from its files alone"),
        ("finalize", "finish an export whose tasks are all committed"),
        ("gc", "remove what dead attempts left behind; safe while others work"),
    ):
        part = _verb(kinds.add_parser, name, runs["export_files"], what)
        part.add_argument("out", help="directory or URL of the export")
        part.set_defaults(part=name)
    _add_verify(kinds.add_parser, runs)


def _add_order(add: AddParser, runs: Runs) -> None:
    text = "who reads what, as JSON lines; with --simulate what an order costs and how it mixes"
    parser = _verb(add, "order", runs["order"], text)
    parser.add_argument("source", nargs="?", help="config (.yaml), or directory of an index")
    parser.add_argument("overrides", nargs="*", help="settings of the config as a.b=c")
    parser.add_argument("--steps", type=steps, default=range(1), metavar="A:B", help="(0:1)")
    parser.add_argument("--simulate", action="store_true", help="a table, planned on counts alone")
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
    counts = parser.add_argument_group("simulation of equal shards that need not exist")
    counts.add_argument("--shards", type=int, help="how many")
    counts.add_argument("--samples-per-shard", type=int, default=1000, help="(%(default)s)")
    counts.add_argument("--mean-bytes", type=size, default=115_000, help="per sample (%(default)s)")


def _add_doctor(add: AddParser, runs: Runs) -> None:
    text = "will this training start, and stay up? a line per check; exit 1 if one fails"
    parser = _verb(add, "doctor", runs["doctor"], text)
    parser.add_argument("config", type=Path, help="YAML file of the training")
    parser.add_argument("overrides", nargs="*", help="settings as a.b=c")
    parser.add_argument("--processes", type=int, default=1, help="of the training (%(default)s)")
    parser.add_argument("--topology", type=Path, help="accelerate config file of the launch")


def _add_bench(add: AddParser, runs: Runs) -> None:
    text = "how close the data path, a training or an export comes to what this machine can do"
    benches = add("bench", help=text, description=f"{text.capitalize()}.")
    kinds = benches.add_subparsers(required=True, metavar="WHAT")
    parsers = {
        kind: _verb(kinds.add_parser, kind, runs["bench"], what)
        for kind, what in (
            ("data", "the stream beside raw reading and decoding"),
            ("train", "the training beside a bare loop in memory"),
            ("export", "the export beside decoding and encoding alone"),
        )
    }
    for kind, parser in parsers.items():
        folder = "export" if kind == "export" else "train"
        parser.add_argument("config", type=Path, help=f"YAML file, see configs/{folder}/")
        parser.add_argument("overrides", nargs="*", help="settings as a.b=c")
        parser.add_argument("--rounds", type=int, default=5, help="after a warm-up (%(default)s)")
        parser.set_defaults(kind=kind)
    parsers["data"].add_argument(
        "--images", type=int, default=16_384, help="per round (%(default)s)"
    )
    parsers["export"].add_argument(
        "--processes", type=int, help="else one per core, or per GPU where there are any"
    )
    train = parsers["train"]
    train.add_argument("--steps", type=int, default=20, help="per round (%(default)s)")
    train.add_argument(
        "--checkpoint", action="store_true", help="instead: what saving costs, and what it stalls"
    )


def _add_evaluate(add: AddParser, runs: Runs) -> None:
    parser = _verb(
        add, "evaluate", runs["evaluate"], "evaluate a run's checkpoint on held-out data"
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--step", type=step, help="of the checkpoint, or `best`; else the newest")
    parser.add_argument("--split", help="of the data; else the config's held-out split")


def _add_export_model(add: AddParser, runs: Runs) -> None:
    text = "write a run's model as safetensors and config.json, to be loaded without the run"
    parser = _verb(add, "export-model", runs["export_model"], text)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="folder for the model; must not exist")
    parser.add_argument("--step", type=step, help="of the checkpoint, or `best`; else the newest")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="their moving average, or as trained (%(default)s)",
    )
    parser.add_argument("--onnx", action="store_true", help="encoder and decoder as ONNX, too")
    parser.add_argument(
        "--torch-export", action="store_true", help="encoder and decoder as .pt2 programs, too"
    )
    parser.add_argument(
        "--latents", metavar="EXPORT", help="finished export of this model: notes its scaling"
    )


def _add_probe(add: AddParser, runs: Runs) -> None:
    text = "what can be read off exported latents: a linear probe and nearest neighbours"
    parser = _verb(add, "probe", runs["probe"], text)
    parser.add_argument("export", type=Path, help="directory of a finished export")
    parser.add_argument("--source", type=Path, help="its data set: probes raw pixels, too")
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="`label` or a field of the samples' JSON, several times; else all that fit",
    )
    parser.add_argument("--max-samples", type=int, default=8000, help="(%(default)s)")


def parser(runs: Runs) -> argparse.ArgumentParser:
    """The whole command line; `runs`: what each verb calls."""
    top = argparse.ArgumentParser(
        prog="latentmill",
        description="Train convolutional autoencoders on sharded data, export latents in bulk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"latentmill {__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")
    _add_pack(verbs.add_parser, runs)
    _add_index(verbs.add_parser, runs)
    _add_verify(verbs.add_parser, runs)
    _add_export(verbs.add_parser, runs)
    _add_order(verbs.add_parser, runs)
    _add_doctor(verbs.add_parser, runs)
    _add_bench(verbs.add_parser, runs)
    _add_evaluate(verbs.add_parser, runs)
    _add_export_model(verbs.add_parser, runs)
    _add_probe(verbs.add_parser, runs)
    return top


def parse_train(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of `pipeline.train`; overrides contain an equals sign."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train",
        description="Train, or resume the training that config and run_dir name.",
    )
    parser.add_argument("config", type=Path, help="YAML file, see configs/train/")
    parser.add_argument("overrides", nargs="*", help="settings as a.b=c (or --a.b=c)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and its sizes, and exit"
    )
    parser.add_argument(
        "--accept-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="resume although this setting differs from the run's; recorded",
    )
    is_override = re.compile(r"--[\w.]+\.[\w.]*=|--\w+=")
    argv = [
        a.removeprefix("--") if is_override.match(a) and not a.startswith("--accept-change") else a
        for a in argv
    ]
    return parser.parse_intermixed_args(argv)
