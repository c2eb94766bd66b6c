"""The verbs of the command line `latentmill`: a file or a folder each, parser and work together.

A verb is a module, or an object in one where two verbs are alike. It has `HELP`, a line for the
list of verbs, and `add_arguments(parser)`, which is called for the chosen verb, and sets
`run(arguments) -> exit code`. Heavy imports are inside `run`, so that `--help` is fast and needs
no torch.

Add a verb: one file, and its name below.
"""

import argparse
from typing import Protocol

from pipeline.commands import (
    bench,
    config,
    doctor,
    evaluate,
    export,
    export_model,
    import_model,
    index,
    order,
    pack,
    probe,
    train,
    verify,
)
from pipeline.commands.clusters import k8s, slurm


class Verb(Protocol):
    """A module of this folder, or an object in one; its name, with dashes, is the verb."""

    __name__: str

    @property
    def HELP(self) -> str:  # noqa: N802 - a constant of the module
        """The verb's line in the list of verbs."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the verb's arguments, and the function it calls."""
        ...


# As `latentmill --help` lists them.
VERBS: tuple[Verb, ...] = (
    pack,
    index,
    config,
    train,
    export,
    verify,
    slurm,
    k8s,
    order,
    doctor,
    bench,
    evaluate,
    export_model,
    import_model,
    probe,
)
