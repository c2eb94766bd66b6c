"""The command line `latentmill VERB ...`: parse, call the verb's part, print its report.

Nothing is computed here. Each verb imports its part inside its function, so that `--help` of every
verb answers at once, without torch. Reports go to stdout, as text or (`--json`) as one JSON object;
progress and errors go to stderr.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import __version__
from pipeline.console import print_report, print_scores, size
from pipeline.errors import DONE, FAILED, WRONG_USE, UserError

if TYPE_CHECKING:
    from pipeline.data.splits import SplitSpec

Run = Callable[[argparse.Namespace], int]
AddParser = Callable[..., argparse.ArgumentParser]

EPILOG = """\
Training and export run under accelerate, on any number of processes; the same command resumes:
  accelerate launch [...] -m pipeline.train  configs/train/vae.yaml       [a.b=c ...]
  accelerate launch [...] -m pipeline.export configs/export/parquet.yaml  [a.b=c ...]
`python -m launch local --help` starts several processes on one machine.

Exit codes: 0 done, 2 wrong use or input, 1 everything else.
"""
SPLIT = "{by: key, fractions: {train: 0.98, held_out: 0.02}, seed: 0}"
LEVELS = ("listing", "counts", "hashes", "keys", "statistics")  # pipeline.export.verify's


def _split(arguments: argparse.Namespace) -> "SplitSpec | None":
    """The split that was asked for; None leaves the choice to the verb."""
    from pipeline import strict
    from pipeline.data.splits import SplitSpec

    if arguments.split is None:
        return None
    return strict.load(SplitSpec, None, [], text=arguments.split)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def pack_folder(arguments: argparse.Namespace) -> int:
    """Pack an image folder."""
    from pipeline.data.pack import pack_folder

    report = pack_folder(
        arguments.source,
        arguments.out,
        shard_bytes=arguments.shard_bytes,
        shard_samples=arguments.shard_samples,
        resize=arguments.resize,
        shuffle_seed=arguments.shuffle_seed,
        workers=arguments.workers,
        split=_split(arguments),
        progress=_progress,
    )
    print_report(asdict(report), arguments.json)
    return DONE


def pack_sprites(arguments: argparse.Namespace) -> int:
    """Draw and pack the built-in data set."""
    from pipeline.data.pack import pack_sprites

    report = pack_sprites(
        arguments.out,
        count=arguments.count,
        seed=arguments.seed,
        shard_samples=arguments.shard_samples,
        workers=arguments.workers,
        split=_split(arguments),
        progress=_progress,
    )
    print_report(asdict(report), arguments.json)
    return DONE


def index(arguments: argparse.Namespace) -> int:
    """Index shards."""
    from pipeline.data.index import build_index

    built = build_index(
        arguments.shards,
        out=arguments.out,
        split=_split(arguments),
        workers=arguments.workers,
        progress=_progress,
    )
    splits = {name: int(built.counts(name).sum()) for name in built.split_spec.names}
    fields = {
        "index": built.path,
        "dataset_id": built.dataset_id,
        "num_shards": len(built.shards),
        "num_samples": built.num_samples,
        "num_samples_per_split": splits,
        "num_bytes": sum(shard.bytes for shard in built.shards),
        "num_duplicate_keys": built.num_duplicate_keys,
        "duplicate_keys": built.duplicate_keys,
        "damage": [f"{shard}: {damage.text}" for shard, damage in built.damage],
    }
    print_report(fields, arguments.json)
    return DONE


def verify(arguments: argparse.Namespace) -> int:
    """Verify an export, or shards against their index."""
    from pipeline.data.verify import has_index, verify_shards
    from pipeline.export.verify import verify_export

    path, shards = arguments.path, arguments.shards
    if has_index(path):
        report = verify_shards(path, shards=shards, progress=_progress)
    else:
        report = verify_export(path, source=arguments.source, shards=shards, level=arguments.level)
    print_report(asdict(report), arguments.json)
    return FAILED if report.problems else DONE


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a run's checkpoint on held-out data."""
    from pipeline.evaluate import evaluate_run

    metrics = evaluate_run(arguments.run, step=arguments.step, split=arguments.split)
    print_report(dict(metrics), arguments.json)
    return DONE


def probe(arguments: argparse.Namespace) -> int:
    """Probe exported latents."""
    from pipeline.probe import probe_export

    scores = probe_export(
        arguments.export,
        source=arguments.source,
        targets=arguments.target,
        max_samples=arguments.max_samples,
    )
    print_scores([asdict(score) for score in scores], arguments.json)
    return DONE


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


def _add_pack(add: AddParser) -> None:
    text = "write images into webdataset shards, and index them"
    sources = add("pack", help=text, description=f"{text.capitalize()}.")
    kinds = sources.add_subparsers(required=True, metavar="SOURCE")

    folder = _verb(
        kinds.add_parser, "folder", pack_folder, "an image folder; sub-folders are the classes"
    )
    folder.add_argument("source", type=Path, help="directory with the images")
    folder.add_argument("out", type=Path, help="directory for the shards")
    folder.add_argument("--shard-bytes", type=size, default=256 << 20, help="at most (256M)")
    folder.add_argument("--shard-samples", type=int, default=10_000, help="at most (%(default)s)")
    folder.add_argument("--resize", type=int, metavar="PIXELS", help="shorter side; else as it is")
    folder.add_argument("--shuffle-seed", type=int, metavar="SEED", help="else sorted by path")
    sprites = _verb(
        kinds.add_parser, "sprites", pack_sprites, "the built-in sprites with known factors"
    )
    sprites.add_argument("out", type=Path, help="directory for the shards")
    sprites.add_argument("--count", type=int, default=10_000, help="images (%(default)s)")
    sprites.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    sprites.add_argument("--shard-samples", type=int, default=1_000, help="at most (%(default)s)")
    for parser in (folder, sprites):
        _add_split(parser)
        _add_workers(parser)


def _add_index(add: AddParser) -> None:
    parser = _verb(add, "index", index, "index webdataset shards, once per data set or new split")
    parser.add_argument("shards", help="directory, or glob or brace pattern of shards")
    parser.add_argument("--out", type=Path, help="where the index goes; else beside the shards")
    _add_split(parser)
    _add_workers(parser)


def _add_verify(add: AddParser) -> None:
    text = "check an export, or shards against their index; exit 1 if anything is wrong"
    parser = _verb(add, "verify", verify, text)
    parser.add_argument("path", type=Path, help="directory of the export, or of the index")
    parser.add_argument("--source", type=Path, help="index of an export's data, to compare keys")
    parser.add_argument("--shards", type=Path, help="where the shards lie; else beside the index")
    parser.add_argument(
        "--level", choices=LEVELS, default=LEVELS[-1], help="how deep, for an export (%(default)s)"
    )


def _add_evaluate(add: AddParser) -> None:
    parser = _verb(add, "evaluate", evaluate, "evaluate a run's checkpoint on held-out data")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--step", type=int, help="of the checkpoint; else the newest good one")
    parser.add_argument("--split", help="of the data; else the config's held-out split")


def _add_probe(add: AddParser) -> None:
    text = "what can be read off exported latents: a linear probe and nearest neighbours"
    parser = _verb(add, "probe", probe, text)
    parser.add_argument("export", type=Path, help="directory of a finished export")
    parser.add_argument("--source", type=Path, help="its data set: probes raw pixels, too")
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="`label` or a field of the samples' JSON, several times; else all that fit",
    )
    parser.add_argument("--max-samples", type=int, default=8000, help="(%(default)s)")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="latentmill",
        description="Train convolutional autoencoders on sharded data, export latents in bulk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"latentmill {__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")
    _add_pack(verbs.add_parser)
    _add_index(verbs.add_parser)
    _add_verify(verbs.add_parser)
    _add_evaluate(verbs.add_parser)
    _add_probe(verbs.add_parser)
    return top


def main(argv: Sequence[str]) -> int:
    """Run one verb and return the exit code; `argv` without the program's name."""
    arguments = parser().parse_args(argv)
    try:
        code = arguments.call(arguments)
        sys.stdout.flush()  # so that a reader that has gone shows up here
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader (head, less) has gone: nobody is left to tell, and Python would complain again
        # when it flushes stdout at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def entry() -> None:
    """The console script `latentmill`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
