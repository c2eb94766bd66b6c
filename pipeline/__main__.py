"""The command line `latentmill VERB ...`: parse, call the verb's part, print its report.

Nothing is computed here. Each verb imports its part inside its function, so that `--help` of every
verb answers at once, without torch. Reports go to stdout, as text or (`--json`) as one JSON object;
progress and errors go to stderr.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from pipeline import needs
from pipeline.console import print_report, print_scores
from pipeline.errors import DONE, FAILED, WRONG_USE, StoreError, UserError
from pipeline.verbs import Run, parser

if TYPE_CHECKING:
    from pipeline.data.index.splits import SplitSpec


def _split(arguments: argparse.Namespace) -> "SplitSpec | None":
    """The split that was asked for; None leaves the choice to the verb."""
    from pipeline import strict
    from pipeline.data.index.splits import SplitSpec

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
    from pipeline.data.index.build import summary

    built = build_index(
        arguments.shards,
        out=arguments.out,
        split=_split(arguments),
        deep=arguments.deep,
        workers=arguments.workers,
        progress=_progress,
    )
    print_report(summary(built), arguments.json)
    return DONE


def verify(arguments: argparse.Namespace) -> int:
    """Verify an export, or shards against their index."""
    from pipeline.data.index.verify import has_index, verify_shards
    from pipeline.export.verify import LEVELS, verify_export

    path, shards = arguments.path, arguments.shards
    level = arguments.level or (LEVELS[-1] if arguments.run else LEVELS[-2])
    if has_index(path):
        how = {"decode": arguments.decode, "threads": arguments.threads}
        report = verify_shards(path, shards=shards, progress=_progress, **how)
    elif level == "encode":
        from pipeline.export.reencode import verify_with_run

        places = {"source": arguments.source, "shards": shards}
        report = verify_with_run(path, arguments.run, **places, num_tasks=arguments.tasks)
    else:
        report = verify_export(path, source=arguments.source, shards=shards, level=level)
    print_report(asdict(report), arguments.json)
    return FAILED if report.problems else DONE


def export_plan(arguments: argparse.Namespace) -> int:
    """Write the plan of an export."""
    from pipeline.export.command import make_plan

    print_report(asdict(make_plan(arguments.config, arguments.overrides)), arguments.json)
    return DONE


def export_run(arguments: argparse.Namespace) -> int:
    """Take part in an export."""
    from pipeline.export.__main__ import run

    return run(arguments)


def export_files(arguments: argparse.Namespace) -> int:
    """Look at an export, finish it, or clean up behind it, from its files alone."""
    from pipeline.export.status import collect_garbage, export_status, finalize_export

    parts = {"status": export_status, "finalize": finalize_export, "gc": collect_garbage}
    print_report(asdict(parts[arguments.part](arguments.out)), arguments.json)
    return DONE


def order(arguments: argparse.Namespace) -> int:
    """Say who reads what, or what an order would cost."""
    from pipeline.order import Request, assignments, simulation

    request = Request(**{field.name: getattr(arguments, field.name) for field in fields(Request)})
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


def doctor(arguments: argparse.Namespace) -> int:
    """Examine a training that is to be started."""
    from pipeline.doctor import diagnose

    findings = diagnose(
        arguments.config,
        arguments.overrides,
        world=arguments.processes,
        topology=arguments.topology,
    )
    if arguments.json:
        print_report({"findings": [asdict(finding) for finding in findings]}, as_json=True)
    else:
        print("\n".join(finding.line(sys.stdout.isatty()) for finding in findings))
    return FAILED if any(finding.verdict == "FAIL" for finding in findings) else DONE


def bench(arguments: argparse.Namespace) -> int:
    """Measure the data path, the training loop, its saves (--checkpoint), or the export."""
    from pipeline import strict
    from pipeline.bench.checkpoint import bench_checkpoint
    from pipeline.bench.data import bench_data
    from pipeline.bench.export import bench_export
    from pipeline.bench.train import bench_train
    from pipeline.config import TrainConfig
    from pipeline.export.settings import ExportConfig

    rounds = arguments.rounds
    settings = ExportConfig if arguments.kind == "export" else TrainConfig
    config = strict.load(settings, arguments.config, arguments.overrides)
    if isinstance(config, ExportConfig):
        result = bench_export(config, processes=arguments.processes, rounds=rounds)
    elif arguments.kind == "data":
        result = bench_data(config, num_images=arguments.images, rounds=rounds)
    else:
        measure = bench_checkpoint if arguments.checkpoint else bench_train
        result = measure(config, num_steps=arguments.steps, rounds=rounds)
    print_report(asdict(result), arguments.json)
    return DONE


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a run's checkpoint on held-out data."""
    from pipeline.evaluate import evaluate_run

    metrics = evaluate_run(arguments.run, step=arguments.step, split=arguments.split)
    print_report(dict(metrics), arguments.json)
    return DONE


def export_model(arguments: argparse.Namespace) -> int:
    """Export a run's model."""
    from pipeline.export_model import export_model

    report = export_model(
        arguments.run,
        arguments.out,
        step=arguments.step,
        weights=arguments.weights,
        onnx=arguments.onnx,
        torch_export=arguments.torch_export,
        latents=arguments.latents,
    )
    print_report(asdict(report), arguments.json)
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


RUNS: dict[str, Run] = {
    run.__name__: run
    for run in (
        pack_folder,
        pack_sprites,
        index,
        verify,
        export_plan,
        export_run,
        export_files,
        order,
        doctor,
        bench,
        evaluate,
        export_model,
        probe,
    )
}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; overrides a.b=c may stand anywhere behind the config."""
    arguments, rest = parser(RUNS).parse_known_args(argv)
    is_override = ["=" in text and not text.startswith("-") for text in rest]
    if rest and not (hasattr(arguments, "overrides") and all(is_override)):
        parser(RUNS).error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run one verb and return the exit code; `argv` without the program's name."""
    arguments = _parse(argv)
    try:
        code = arguments.call(arguments)
        sys.stdout.flush()  # so that a reader that has gone shows up here
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    except ModuleNotFoundError as error:
        if error.name not in needs.missing():
            raise
        print(f"error: {needs.remedy([error.name])}", file=sys.stderr)
        return WRONG_USE
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
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
