"""`latentmill config`: the shipped settings, to run as they are or to begin one's own from."""

import argparse
import sys

from pipeline.common.arguments import bind
from pipeline.common.console import print_report
from pipeline.common.errors import DONE, UserError
from pipeline.common.shipped import MEANING, purpose, shipped

HELP = "list the settings that come with latentmill; with a name, print one"
EPILOG = "`latentmill config vae > my.yaml` begins settings of one's own."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which settings."""
    bind(parser, run)
    parser.add_argument("name", nargs="?", metavar="NAME", help="as the list has it: vae, zero2")
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Print the list, or the text of one."""
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
    """Print every name with what it is for."""
    listed = {
        kind: {name: purpose(path) for name, path in shipped(kind).items()} for kind in MEANING
    }
    if as_json:
        print_report({**listed}, as_json=True)
        return
    for kind, meaning in MEANING.items():
        print(f"{meaning}:")
        print("\n".join(f"  {name:<14}{text}" for name, text in listed[kind].items()))
