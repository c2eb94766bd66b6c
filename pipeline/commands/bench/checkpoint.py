"""`bench train --checkpoint`: the time of a save, and how long the training waits for it.

plain     torch.save of the same state into one file: no hash, no flush, no rename
whole     our save from beginning to end: gather, write, flush, hash, publish, retain
stall     the part of a background save during which no step is taken
writing   the training's rate while a save is being written, beside its rate without one
"""

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from pipeline.checkpoints.manager import Checkpoints
from pipeline.checkpoints.retention import CheckpointConfig
from pipeline.commands.bench.rounds import rounds_of
from pipeline.commands.bench.train import OurLoop
from pipeline.common.console import in_bytes, in_seconds, listing
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.stream.datasets import open_indexes
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.training.build import check_data


@dataclass(frozen=True)
class CheckpointBench:
    """Medians over the rounds, in seconds; shares and ratios as fractions."""

    rounds: int
    device: str
    directory: Path
    state_bytes: int
    plain_torch_save: float
    whole_save: float
    stall_of_background_save: float
    whole_over_plain: float
    stall_over_whole: float
    training_rate_while_writing: float  # over the rate without a save

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        stall, whole = self.stall_of_background_save, self.whole_save
        return [
            f"a save in the background stops the training for {in_seconds(stall)}, "
            f"{self.stall_over_whole:.0%} of the {in_seconds(whole)} that it takes",
            *listing(
                {
                    "checkpoint": f"{in_bytes(self.state_bytes)} to {self.directory}",
                    "torch.save alone": in_seconds(self.plain_torch_save),
                    "our save, from end to end": (
                        f"{in_seconds(whole)}, {self.whole_over_plain:.1f} x torch.save: "
                        "with hashes, flushed to the disk"
                    ),
                    "rate while one is written": (
                        f"{self.training_rate_while_writing:.0%} of the rate without"
                    ),
                    "measured": f"{rounds_of(self.rounds)} on {self.device}",
                }
            ),
        ]


def bench_checkpoint(config: TrainConfig, *, num_steps: int, rounds: int) -> CheckpointBench:
    """Measure saves of one process, on the disk of `run_dir`, which is left as it was.

    num_steps: of training beside each save, and for the rate without one.
    """
    runtime = Runtime.start(accumulation=config.accumulation)
    if runtime.world > 1:
        raise UserError("bench train measures one process: start it without a launcher.")
    indexes = open_indexes(config.data)
    loop = OurLoop(config, indexes, check_data(config, indexes), runtime)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", "whole", "stall", "rate")}
    try:
        with tempfile.TemporaryDirectory(dir=_existing(Path(config.run_dir))) as folder:
            checkpoints = Checkpoints(
                Path(folder) / "checkpoints",
                CheckpointConfig(),
                strategy=loop.strategy,
                order=loop.order,
                runtime=runtime,
            )
            loop.run(num_steps)
            with closing(checkpoints):
                for number in range(rounds + 1):
                    found = _round(loop, checkpoints, Path(folder), 2 * number, num_steps)
                    for name, value in found.items() if number > 0 else ():  # 0 is a warm-up
                        seconds[name].append(value)
    finally:
        loop.stream.close()
    middle = {name: median(values) for name, values in seconds.items()}
    return CheckpointBench(
        rounds=rounds,
        device=str(runtime.device),
        directory=_existing(Path(config.run_dir)),
        state_bytes=sum(value.nbytes for value in _state(loop.strategy).values()),
        plain_torch_save=middle["plain"],
        whole_save=middle["whole"],
        stall_of_background_save=middle["stall"],
        whole_over_plain=middle["whole"] / middle["plain"],
        stall_over_whole=middle["stall"] / middle["whole"],
        training_rate_while_writing=middle["rate"],
    )


def _round(
    loop: OurLoop, checkpoints: Checkpoints, folder: Path, number: int, num_steps: int
) -> dict[str, float]:
    """Measure each once, in turn, so that the load of the machine changes for all alike."""
    state = _state(loop.strategy)
    started = time.perf_counter()
    torch.save(state, folder / "plain.pt")
    plain = time.perf_counter() - started

    started = time.perf_counter()
    checkpoints.save(number)
    saved = checkpoints.finish()
    whole = time.perf_counter() - started

    alone = loop.run(num_steps)
    checkpoints.read()
    checkpoints.save(number + 1)
    stall = checkpoints.read()["perf/checkpoint_stall_seconds"]
    rates: list[float] = []
    while checkpoints.is_writing or not rates:
        rates.append(loop.run(1))
    if not (saved and checkpoints.finish()):
        raise UserError(f"no checkpoint could be saved in {folder}: see the warning above.")
    return {"plain": plain, "whole": whole, "stall": stall, "rate": median(rates) / alone}


def _state(strategy: Strategy) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in one dictionary."""
    full = strategy.full_state()
    parts = {"model": full.model, "ema": full.ema or {}}
    parts |= {"exp_avg": full.exp_avg, "exp_avg_sq": full.exp_avg_sq}
    return {
        f"{part}.{name}": value for part, named in parts.items() for name, value in named.items()
    }


def _existing(path: Path) -> Path:
    """The nearest existing directory among `path` and its parents."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())
