"""Metrics with networks on one number of processes.

    network_worker.py OUT CONFIG SETTING...

Leaves OUT: the figures of an evaluation in float64 and in float32, and of recorded features.
"""

import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from pipeline.common import strict
from pipeline.common.errors import DONE
from pipeline.common.leaving import leave
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.reconstruction import MetricSums
from pipeline.evaluation.splits import held_out_splits
from pipeline.metrics import EvaluatedBatch
from pipeline.models.autoencoder import build_autoencoder
from pipeline.models.likelihoods import SquaredError
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.training.build import check_data, make_forward

NUM_ROWS, SIZE = 96, 8


def evaluation(config: TrainConfig, runtime: Runtime) -> dict[str, float]:
    """Evaluate the model as it is built."""
    indexes = [Index.open(config.data.path)]
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    model = build_autoencoder(config.model, config.data.decode.event_shape, seed=0, dtype=dtype)
    held_out = HeldOut(
        config,
        held_out_splits(config, indexes, check_data(config, indexes)),
        make_forward(config, runtime.device),
        runtime,
        Quarantine(Path(config.run_dir), config.data, runtime),
    )
    return held_out.evaluate({"eval": partial(nullcontext, model)}, 0)


def recorded_rows(count: int = NUM_ROWS) -> torch.Tensor:
    """Features of images and reconstructions [N, 2, D], float64."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(count, 2, SIZE, generator=generator, dtype=torch.float64)
    return rows.cumsum(1) + 3  # a reconstruction is like its image


def reduction(config: TrainConfig, runtime: Runtime) -> dict[str, float]:
    """Figures of recorded features, of which each process gets its share."""
    values: dict[str, float] = {}
    metrics = [it for it in config.evaluation.metrics if it.kind in ("frechet", "kid")]
    tallies = [MetricSums(metric) for metric in metrics]
    rows, uid = recorded_rows(), torch.arange(NUM_ROWS)
    for part in torch.arange(runtime.rank, NUM_ROWS, runtime.world).split(7):
        # The network of a batch is one that knows the features of its pictures.
        looked_up = {metric.network.sha256: partial(_row, rows) for metric in metrics}
        clean, decoded = (2 * part / 255).view(-1, 1, 1, 1), ((2 * part + 1) / 255)
        batch = EvaluatedBatch(
            uid=uid[part],
            weight=torch.ones(len(part)),
            clean=clean,
            corrupted=clean,
            mean=decoded.view(-1, 1, 1, 1),
            sample=clean,
            output=None,
            losses=None,
            likelihood=SquaredError(),
            model=lambda *_, **__: None,
            networks=looked_up,
        )
        for tally in tallies:
            tally.add(batch)
    for tally in tallies:
        values |= tally.value(runtime)
    return values


def _row(rows: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The features of a picture of one pixel, whose level is their number."""
    return rows.flatten(0, 1)[pictures[:, 0, 0, 0].long()]


def main(out: str, config: str, *settings: str) -> None:
    runtime = Runtime.start(accumulation=1)
    found: dict[str, dict[str, float]] = {}
    for precision in ("fp64", "fp32"):
        loaded = strict.load(TrainConfig, Path(config), [*settings, f"precision={precision}"])
        found[precision] = evaluation(loaded, runtime)
    found["recorded"] = reduction(loaded, runtime)
    if runtime.is_main:
        Path(out).write_text(json.dumps(found))
    leave(DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
