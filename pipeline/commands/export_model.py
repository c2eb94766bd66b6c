"""`latentmill export-model`: write a run's model, to be loaded without the run."""

import argparse
from dataclasses import asdict

from pipeline.common.arguments import bind, directory, step
from pipeline.common.console import print_report
from pipeline.common.errors import DONE

HELP = "write a run's model as safetensors and config.json, usable without the run"
FORMATS = ("latentmill", "diffusers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the weights, the folder, and the forms."""
    bind(parser, run)
    parser.add_argument("run", type=directory("RUN"), help="run directory")
    text = "folder for the model; must not exist"
    parser.add_argument("out", type=directory("OUT"), help=text)
    parser.add_argument(
        "--step", type=step, help="step of the checkpoint, or `best` (default: newest)"
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="moving average of the weights, or as trained (%(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="folder of latentmill, or of diffusers (%(default)s)",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="also write encoder and decoder as ONNX"
    )
    parser.add_argument(
        "--torch-export", action="store_true", help="also write encoder and decoder as .pt2"
    )
    parser.add_argument(
        "--latents", metavar="EXPORT", help="finished export of this model, whose scaling is stored"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export the model, and print what was written."""
    from pipeline.export.model import export_model

    report = export_model(
        arguments.run,
        arguments.out,
        step=arguments.step,
        weights=arguments.weights,
        onnx=arguments.onnx,
        torch_export=arguments.torch_export,
        latents=arguments.latents,
        format=arguments.format,
    )
    print_report(asdict(report), arguments.json, report.lines())
    return DONE
