"""`latentmill pack SOURCE`: write images into webdataset shards, and index them.

The sources' settings are the options: see `pipeline.data.pack.sources`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipeline.common.arguments import add_part, add_split, add_workers
from pipeline.common.console import print_report, progress_line, warn
from pipeline.common.errors import DONE, FAILED

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from pipeline.data.pack.sources import PackSource

HELP = "write images into webdataset shards, and index them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sources and their settings, for which this verb's help imports the sources."""
    parser.description = f"{parser.description} `pack PHOTOS OUT` is `pack folder PHOTOS OUT`."
    kinds = parser.add_subparsers(required=True, metavar="SOURCE")
    for kind, source in _sources().items():
        part = add_part(kinds, kind, run, source.HELP)
        fields = {name: f for name, f in source.model_fields.items() if f.description}
        for name, field in fields.items():
            if field.is_required():
                _add(part, name, field)
        part.add_argument("out", help="directory or URL (s3://...) for the shards")
        for name, field in fields.items():
            if not field.is_required():
                _add(part, "--" + name.replace("_", "-"), field, default=field.default)
        add_split(part)
        add_workers(part)
        part.set_defaults(source_type=source, settings=tuple(fields))


def with_kind(argv: Sequence[str]) -> list[str]:
    """Return a command line of this verb with the kind of its source, which is `folder` if none."""
    first = argv[1] if len(argv) > 1 else "-h"
    if first in ("-h", "--help"):
        return [*argv]
    if first not in _sources():
        return [argv[0], "folder", *argv[1:]]
    if Path(first).is_dir():
        warn(f"`{first}` is the kind of source here; the folder of that name is ./{first}")
    return [*argv]


def _sources() -> "dict[str, type[PackSource]]":
    from pipeline.data.pack.sources import Source

    return {source.model_fields["kind"].default: source for source in get_args(get_args(Source)[0])}


def _add(part: argparse.ArgumentParser, name: str, field: "FieldInfo", **options: Any) -> None:
    if isinstance(field.json_schema_extra, dict):
        options |= field.json_schema_extra
    # A function that reads the text; else X of `X | None`; else X.
    reads = [*filter(callable, field.metadata), *get_args(field.annotation)]
    as_type: Any = reads[0] if reads else field.annotation
    options |= {"action": "store_true"} if as_type is bool else {"type": as_type}
    part.add_argument(name, help=field.description, **options)


def run(arguments: argparse.Namespace) -> int:
    """Pack, and print a report; exit code 1 if the index does not find what was packed."""
    from pipeline.common import strict
    from pipeline.data.index.splits import SplitSpec
    from pipeline.data.pack.pack import pack

    split = arguments.split
    settings = {name: getattr(arguments, name) for name in arguments.settings}
    with progress_line() as progress:
        report = pack(
            arguments.source_type(**settings),
            arguments.out,
            workers=arguments.workers,
            split=split and strict.load(SplitSpec, None, [], text=split),
            progress=progress,
        )
    print_report(asdict(report), arguments.json, report.lines())
    return FAILED if report.lost else DONE
