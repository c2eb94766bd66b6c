"""`latentmill config`: list the shipped settings, or print one as a start for your own."""

import argparse
import sys

from pipeline.common.arguments import bind
from pipeline.common.console import print_report
from pipeline.common.errors import DONE, UserError
from pipeline.common.shipped import MEANING, purpose, shipped

HELP = "list the shipped settings; with a name, print one"
EPILOG = "Start your own settings by `latentmill config vae > my.yaml`."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the name of the settings."""
    bind(parser, run)
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a name of the list, e.g. vae or zero2"
    )
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Print the list, or one text."""
    files = {name: path for kind in MEANING for name, path in shipped(kind).items()}
    if arguments.name is None:
        show_list(as_json=arguments.json)
        return DONE
    if arguments.name not in files:
        raise UserError(
            f"No settings named {arguments.name!r} are shipped. There are {', '.join(files)}."
        )
    text = files[arguments.name].read_text(encoding="utf-8")
    if arguments.json:
        print_report({"name": arguments.name, "text": text}, as_json=True)
    else:
        sys.stdout.write(text)
    return DONE


def show_list(*, as_json: bool) -> None:
    """Print every name and its purpose."""
    listed = {
        kind: {name: purpose(path) for name, path in shipped(kind).items()} for kind in MEANING
    }
    if as_json:
        print_report({**listed}, as_json=True)
        return
    width = max(len(name) for texts in listed.values() for name in texts)
    for kind, meaning in MEANING.items():
        print(f"{meaning}:")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in listed[kind].items()))
