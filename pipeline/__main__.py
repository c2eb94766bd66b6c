"""The command line `latentmill VERB ...`: parse, call the verb, report errors.

`pipeline.commands` has the verbs. Reports go to stdout, as text or (`--json`) as one JSON object;
progress and errors go to stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from pipeline import __version__
from pipeline.commands import VERBS, pack
from pipeline.common import needs
from pipeline.common.arguments import parse, sentence
from pipeline.common.errors import FAILED, WRONG_USE, StoreError, UserError
from pipeline.common.leaving import leave

EPILOG = """\
The main job, with shipped settings (`latentmill config` lists them):
  latentmill pack sprites data/sprites --count 20000
  latentmill train vae
  latentmill export run parquet
The same command continues what was stopped. Settings are overridden as a.b=c:
  latentmill train vae run_dir=runs/mine optimizer.learning_rate.peak=1e-4

Exit codes: 0 done, 2 wrong use or input, 3 stopped and resumable, 1 everything else.
"""


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command line; only the chosen verb adds its arguments."""
    top = argparse.ArgumentParser(
        prog="latentmill",
        description="Train convolutional autoencoders on sharded data, export latents in bulk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"latentmill {__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2].replace("_", "-")
        parser = verbs.add_parser(name, help=verb.HELP, description=sentence(verb.HELP))
        if name == chosen:
            verb.add_arguments(parser)
    return top


def main(argv: Sequence[str]) -> int:
    """Run one verb and return the exit code; `argv` without the program's name."""
    try:
        if not argv:
            build_parser(None).print_help(sys.stderr)
            return WRONG_USE
        words = pack.with_kind(argv) if argv[0] == "pack" else argv
        arguments = parse(build_parser(argv[0]), words)
        code = arguments.call(arguments)
        sys.stdout.flush()  # here a closed pipe raises
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
        # The reader of stdout (head, less) has ended; without this, Python would fail again when it
        # flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def entry() -> None:
    """The console script `latentmill`."""
    leave(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
