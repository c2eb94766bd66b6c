"""The steps of `pipeline.train` with everything recorded: losses and gradient of every step.

    in_turn.py record OUT.npz WINDOWS CONFIG [a.b=c ...]

WINDOWS: "-" runs freely; a directory makes windows of checkpoint.every_steps: each starts from
the checkpoint that stands there for its first step, or leaves one there for others to start from.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints.folder import read_tensors
from pipeline.checkpoints.manager import Checkpoints
from pipeline.checkpoints.retention import CheckpointConfig, Keep
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.distributed.strategies.zero import ZeroStrategy
from pipeline.training.build import make_forward, make_order, make_strategy, warm_up_loss
from tests.distributed.models import is_determined
from tests.shards import open_stream


def record(config: TrainConfig, windows: Path | None = None) -> dict[str, Any]:
    """Run the config's steps; every process calls it and gets the same arrays."""
    runtime = Runtime.start(accumulation=config.accumulation)
    index = Index.open(config.data.path)
    forward = make_forward(config, runtime.device)
    strategy = make_strategy(config, runtime)
    strategy.warm_up(warm_up_loss(config, forward, strategy, runtime))
    losses, gradients, norms, weights, dtypes = [], [], [], [], set()
    stream = open_stream(
        config.data,
        index=index,
        seed=config.seed,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        rank=runtime.rank,
        world=runtime.world,
    )
    with stream:
        for step in range(config.num_steps):
            if windows is not None and step % config.checkpoint.every_steps == 0:
                if runtime.broadcast((windows / f"step-{step}").exists()):
                    strategy.load_full_state(read_tensors(windows / f"step-{step}"))
                else:
                    kept = Checkpoints(
                        windows,
                        CheckpointConfig(keep=Keep(latest=99)),
                        strategy=strategy,
                        order=make_order(config, [index]),
                        runtime=runtime,
                    )
                    kept.save(step)
                    assert kept.finish()
            samples = step * config.batch_size
            strategy.set_learning_rates(config.learning_rates_at(samples))
            parts = next(stream).split(config.accumulation)
            sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
            for number, part in enumerate(parts, start=1):
                inputs = forward.inputs(part, "train")
                with strategy.accumulate(is_last=number == len(parts)):
                    _, found = forward.run(
                        strategy.model,
                        inputs,
                        weights=config.objective.weights_at(samples),
                        samples=samples,
                    )
                    strategy.backward((found.total * inputs.weight).sum() / len(inputs.weight))
                dtypes |= {str(value.dtype) for value in (found.total, found.distortion)}
                sums += torch.stack(
                    [(found.total * inputs.weight).sum().double(), inputs.weight.sum().double()]
                ).detach()
            gradients.append(gradient_of(strategy))
            weights.append(runtime.gather(float(sums[1])))
            losses.append(float(runtime.sum(sums)[0]) / config.batch_size)
            norms.append(float(strategy.step().grad_norm))
    final = strategy.full_state().model
    parameters = [value.flatten() for name, value in sorted(final.items()) if is_determined(name)]
    return {
        "losses": np.array(losses),
        "gradients": np.stack(gradients),
        "norms": np.array(norms),
        "weights": np.array(weights),  # [steps, ranks]
        "dtypes": np.array(sorted(dtypes)),
        "parameters": torch.cat(parameters).cpu().numpy(),
        "world": runtime.world,
        "wrapper": type(strategy.model).__name__,
    }


def gradient_of(strategy: Strategy) -> np.ndarray:
    """The whole gradient of the global batch's mean loss, whoever holds which part of it."""
    if isinstance(strategy, ZeroStrategy):
        read = import_module("deepspeed.utils").safe_get_full_grad
        found = [read(parameter) for parameter in strategy.model.parameters()]
    else:
        found = [parameter.grad for parameter in strategy.model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found]).cpu().numpy().copy()


def main(out: str, windows: str, config: str, *overrides: str) -> int:
    found = record(
        strict.load(TrainConfig, Path(config), overrides), None if windows == "-" else Path(windows)
    )
    if Runtime.start(accumulation=1).is_main:
        np.savez(out, **found)
    return 0
