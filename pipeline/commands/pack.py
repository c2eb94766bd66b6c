"""`latentmill pack SOURCE`: write images into webdataset shards, and index them.

The sources' settings are the options: see `pipeline.data.pack.sources`.
"""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from pipeline.common.arguments import add_part, add_split, add_workers
from pipeline.common.console import print_report, progress
from pipeline.common.errors import DONE

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

HELP = "write images into webdataset shards, and index them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sources and their settings, for which this verb's help imports the sources."""
    from pipeline.data.pack.sources import Source

    kinds = parser.add_subparsers(required=True, metavar="SOURCE")
    for source in get_args(get_args(Source)[0]):
        part = add_part(kinds, source.model_fields["kind"].default, run, source.HELP)
        own = {name: source.model_fields.get(name) for name in source.__annotations__}
        fields = {name: field for name, field in own.items() if field and field.description}
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


def _add(part: argparse.ArgumentParser, name: str, field: "FieldInfo", **options: Any) -> None:
    if isinstance(field.json_schema_extra, dict):
        options |= field.json_schema_extra
    # A function that reads the text; else X of `X | None`; else X.
    reads = [*filter(callable, field.metadata), *get_args(field.annotation)]
    as_type: Any = reads[0] if reads else field.annotation
    part.add_argument(name, type=as_type, help=field.description, **options)


def run(arguments: argparse.Namespace) -> int:
    """Pack, and print a report."""
    from pipeline.common import strict
    from pipeline.data.index.splits import SplitSpec
    from pipeline.data.pack.pack import pack

    split = arguments.split
    settings = {name: getattr(arguments, name) for name in arguments.settings}
    report = pack(
        arguments.source_type(**settings),
        arguments.out,
        workers=arguments.workers,
        split=split and strict.load(SplitSpec, None, [], text=split),
        progress=progress,
    )
    print_report(asdict(report), arguments.json, report.lines())
    return DONE
