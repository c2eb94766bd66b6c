"""`latentmill import-model`: a model of diffusers, LDM or FLUX as a folder of this project."""

import argparse
from dataclasses import asdict
from pathlib import Path

from pipeline.common.arguments import bind, directory, pixels
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "make a model's folder from one of diffusers, or a single .safetensors file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source, the folder, and the size of its pictures."""
    bind(parser, run)
    parser.add_argument(
        "source",
        type=Path,
        help="folder with config.json and weights, that of a pipeline with vae/ in it, or a file",
    )
    text = "folder for the model; must not exist"
    parser.add_argument("out", type=directory("OUT"), help=text)
    parser.add_argument(
        "--size",
        type=pixels,
        metavar="N|HxW",
        help="of pictures, in pixels: 256, or 256x384 (default: what the folder says)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Import the model, and print what it is."""
    from pipeline.models.interchange.importing import import_model

    report = import_model(arguments.source, arguments.out, size=arguments.size)
    print_report(asdict(report), arguments.json, report.lines())
    return DONE
