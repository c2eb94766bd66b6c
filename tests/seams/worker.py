"""All that is asked of the members on one strategy and number of processes, in one start.

    worker.py OUT CONFIG SETTING... -- JOB...

Runs in a copy of the tree that has the members. Each job leaves OUT/JOB.npz or OUT/JOB.json.
"""

import json
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.common import strict
from pipeline.common.errors import DONE
from pipeline.common.leaving import leave
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.held_out import HeldOut, Show, views_of
from pipeline.evaluation.reconstruction import MetricSums
from pipeline.evaluation.splits import held_out_splits
from pipeline.metrics import EvaluatedBatch
from pipeline.models.autoencoder import ModelOutput, build_autoencoder
from pipeline.models.bottlenecks import Code, Posterior
from pipeline.models.likelihoods import SquaredError
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.meter import TrainingMeter
from pipeline.monitoring.sheets import Sheet
from pipeline.training.build import check_data, make_forward, make_strategy, warm_up_loss
from pipeline.training.forward import Inputs
from pipeline.training.step import train_step
from tests.distributed.equivalence_worker import record
from tests.shards import open_stream

PLAIN = (
    "objective.emphasis={}",
    "model.likelihood={kind: gaussian, sigma: 0.3}",
    "optimizer.learning_rate={peak: 0.002, warmup_samples: 0}",
    "optimizer.max_grad_norm=null",
)
JOBS = {
    "edges": ("objective.regularisers=[{kind: kl}, {kind: edges, weight: 3.0}]",),
    "no_edges": ("objective.regularisers=[{kind: kl}]",),
    "spread": ("objective.regularisers=[{kind: kl}, {kind: spread, weight: 20.0}]",),
    "duel": (
        "objective.regularisers=[{kind: kl}, {kind: duel, weight: 30000.0, "
        "discriminator: {weight: 10.0, rate: 2.0, beta1: 0.5}}]",
    ),
    "rest": (
        "objective.regularisers=[{kind: kl}, {kind: duel, discriminator: {weight: 0.0}, "
        "weight: {kind: linear, over_samples: 24}}]",
        "optimizer.weight_decay=0.1",
    ),
    "codebook": ("model.bottleneck={kind: codebook, size: 4}", "objective.regularisers=[]"),
    "mirror": ("latent_transforms=[{kind: mirror}]",),
    "evaluation": (
        "evaluation.metrics=[{kind: squared_error}, {kind: log_likelihood}, {kind: covariance}, "
        "{kind: median}, {kind: psnr}, {kind: ssim}, {kind: ssim, decodes: sample}, "
        "{kind: active_units}, {kind: kl_per_dimension}]",
        "monitor.num_images=5",
    ),
    "mirrored": ("latent_transforms=[{kind: mirror}]",),
    "reduction": (
        "evaluation.metrics=[{kind: covariance}, {kind: median}, {kind: psnr}, "
        "{kind: active_units}, {kind: kl_per_dimension}]",
    ),
}


def evaluation(config: TrainConfig) -> dict[str, Any]:
    """Evaluate in one chunk, in many, and one view after the other; what the model got to see."""
    runtime = Runtime.start(accumulation=config.accumulation)
    indexes = [Index.open(config.data.path)]
    forward = make_forward(config, runtime.device)
    strategy = make_strategy(config, runtime)
    strategy.warm_up(warm_up_loss(config, forward, strategy, runtime))
    with torch.no_grad():  # the average is another model
        before = strategy.full_state()
        before.ema = {name: 1.5 * value for name, value in before.model.items()}
        strategy.load_full_state(before)
    splits = held_out_splits(config, indexes, check_data(config, indexes))
    quarantine = Quarantine(Path(config.run_dir), config.data, runtime)
    views = views_of(strategy, config)
    sizes: set[int] = set()
    hook = strategy.model.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))

    shown: dict[str, Any] = {}

    def keep(step: int, name: str, sheet: Sheet) -> None:
        pictures = {k: sha256(pixels).hexdigest() for k, pixels in sheet.pictures.items()}
        shown[name] = {"step": step, "pictures": pictures, **sheet.contents}

    def run(chosen: Any, chunk_bytes: int, show: Show | None = None) -> dict[str, float]:
        held_out = HeldOut(config, splits, forward, runtime, quarantine, chunk_bytes)
        return held_out.evaluate(chosen, step=0, show=show)

    whole = run(views, 1 << 30, keep)
    several = run(views, 100_000)
    single = run(views, 1)
    two_passes: dict[str, float] = {}
    for name, view in views.items():
        two_passes |= run({name: view}, 1)
    hook.remove()
    after = strategy.full_state()
    same = all(torch.equal(after.model[name], value) for name, value in before.model.items())
    return {
        "whole": whole,
        "several": several,
        "single": single,
        "two_passes": two_passes,
        "shown": shown,
        "sizes": sorted(sizes),
        "weights_stay": same,
    }


def mirrored(config: TrainConfig) -> dict[str, Any]:
    """For several steps: whether z, and whether the target, is mirrored in each micro-batch."""
    forward = make_forward(config, torch.device("cpu"))
    shape = config.data.decode.event_shape
    model = build_autoencoder(config.model, shape, seed=0, dtype=torch.float32)
    x = torch.rand(4, *shape)
    keys = torch.arange(4)
    found: list[list[bool]] = []
    for samples in range(0, 200, 8):
        sides: list[bool] = []
        for part in (slice(2), slice(2, 4)):
            inputs = Inputs(x[part], x[part], None, keys[part], torch.ones(2))
            weights = config.objective.weights_at(samples)
            output, losses = forward.run(model, inputs, weights=weights, samples=samples)
            target = output.target
            evaluated, _ = forward.run(model, inputs, weights=weights)
            assert torch.equal(output.z, evaluated.z)  # only what is decoded is mirrored
            decoded = [model(z, mode="decode").decoded for z in (output.z, output.z.flip(1))]
            for now, plain, mirrored in (
                (output.decoded, *decoded),
                (target, x[part], x[part].flip(-1)),
            ):
                assert torch.equal(now, plain) != torch.equal(now, mirrored)
                sides.append(torch.equal(now, mirrored))
            error = (config.model.likelihood.mean(output.decoded) - target).square()
            assert torch.allclose(losses.squared_error, error.flatten(1).sum(1))
        found.append(sides)
    return {"sides": found}


def reduction(config: TrainConfig) -> dict[str, Any]:
    """Metrics of recorded values, of which each process gets its share of every batch."""
    runtime = Runtime.start(accumulation=config.accumulation)
    recorded = torch.Generator().manual_seed(7)
    num, size = 96, config.batch_size // runtime.world
    z = torch.randn(num, 5, generator=recorded, dtype=torch.float64)
    weight = (torch.rand(num, generator=recorded) > 0.1).float()
    uid = torch.randperm(num, generator=recorded) + (1 << 48)
    tallies = [MetricSums(metric, seed=3) for metric in config.evaluation.metrics]
    first = runtime.rank * size
    for start in range(first, num, config.batch_size):
        for part in torch.arange(start, start + size).chunk(config.accumulation):
            seen = EvaluatedBatch(
                uid=uid[part],
                weight=weight[part],
                clean=torch.zeros(len(part), 5, dtype=torch.float64),
                corrupted=z[part],
                mean=z[part],
                sample=z[part],
                output=ModelOutput(Code(z[part], Posterior(z[part], -z[part])), z[part], {}),
                losses=None,
                likelihood=SquaredError(),
                model=lambda z, **_: ModelOutput(None, z, {}),
                networks={},
            )
            for tally in tallies:
                tally.add(seen)
    values: dict[str, float] = {}
    for tally in tallies:
        values |= tally.value(runtime)
    return values


def main(out: str, config: str, *words: str) -> None:
    cut = words.index("--")
    settings, jobs = words[:cut], words[cut + 1 :]
    folder = Path(out)
    for job in jobs:
        overrides = [*PLAIN, *JOBS[job], f"run_dir={out}", "num_steps=6", *settings]
        loaded = strict.load(TrainConfig, Path(config), overrides)
        found = OTHERS.get(job, record)(loaded)
        if Runtime.start(accumulation=loaded.accumulation).is_main:
            if job in OTHERS:
                (folder / f"{job}.json").write_text(json.dumps(found))
            else:
                np.savez(folder / f"{job}.npz", **found)
    leave(DONE)


def rest(config: TrainConfig) -> dict[str, Any]:
    """What moves in a few steps in which the discriminator rests, and decay is on."""
    runtime = Runtime.start(accumulation=config.accumulation)
    forward = make_forward(config, runtime.device)
    strategy = make_strategy(config, runtime)
    strategy.warm_up(warm_up_loss(config, forward, strategy, runtime))
    before = strategy.full_state().model
    stream = open_stream(
        config.data,
        index=Index.open(config.data.path),
        seed=config.seed,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        rank=runtime.rank,
        world=runtime.world,
    )
    with stream:
        meter = TrainingMeter(runtime, stream)
        for step, batch in enumerate(stream):
            train_step(batch, step * config.batch_size, config, forward, strategy, meter)
    after = strategy.full_state().model
    return {name: not torch.equal(after[name], value) for name, value in before.items()}


Job = Callable[[TrainConfig], dict[str, Any]]
OTHERS: dict[str, Job] = {
    "evaluation": evaluation,
    "mirrored": mirrored,
    "reduction": reduction,
    "rest": rest,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
