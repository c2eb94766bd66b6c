"""`bench train`: our training step, fed by the stream, beside a bare loop on preloaded tensors.

    ours    stream -> train_step of pipeline.training: corruption, model, update, average, meter
    bare    tensors in memory -> the same corruption -> the same model -> backward, clip, AdamW

With and without corruption, the same in both loops. One process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.commands.bench.rounds import Rates, interleave, rounds_of, share
from pipeline.common.console import plural, table
from pipeline.common.errors import UserError
from pipeline.common.precision import parameter_dtype
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.stream import Stream, open_stream
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.datasets import open_indexes
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.runtime import Runtime
from pipeline.models.autoencoder import build_autoencoder
from pipeline.monitoring.meter import TrainingMeter
from pipeline.training.build import (
    check_data,
    make_forward,
    make_order,
    make_strategy,
    move_model,
    warm_up_loss,
)
from pipeline.training.step import train_step

NUM_PRELOADED = 8  # batches that the bare loop repeats


@dataclass(frozen=True)
class TrainBench:
    """Rates in images per second, medians over the rounds; shares and waits as fractions."""

    steps_per_round: int
    rounds: int
    device: str
    torch_threads: int
    images_per_second: Rates
    share_of_bare_loop: dict[str, float]
    data_wait: dict[str, float]

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        name, best = next(iter(self.share_of_bare_loop.items()))
        rates = self.images_per_second
        rows = [
            (
                variant,
                f"{rates[f'ours, {variant}']:,.0f}",
                f"{rates[f'bare, {variant}']:,.0f}",
                share(of_bare),
                f"{self.data_wait[variant]:.0%}",
            )
            for variant, of_bare in self.share_of_bare_loop.items()
        ]
        lines = [
            f"{rates[f'ours, {name}']:,.0f} images/s on {self.device}, {share(best)} of a bare "
            "loop over tensors in memory",
            *table(("training", "images/s", "bare loop", "share", "waits for data"), rows),
            f"{rounds_of(self.rounds)} of {plural(self.steps_per_round, 'step')}, "
            f"{plural(self.torch_threads, 'thread')} of torch",
        ]
        if max(self.share_of_bare_loop.values()) > 1:
            lines.append("above the bare loop: noise, so take more --rounds or --steps")
        return lines


def bench_train(config: TrainConfig, *, num_steps: int, rounds: int) -> TrainBench:
    """Measure the training loop of one process; raises UserError if the data is not there."""
    runtime = Runtime.start(accumulation=config.accumulation)
    if runtime.world > 1:
        raise UserError("bench train measures one process: start it without a launcher.")
    indexes = open_indexes(config.data)
    states = check_data(config, indexes)
    variants = {"plain": config.model_copy(update={"corruptions": ()})}
    if config.corruptions:
        variants = {"with corruption": config, "without corruption": variants["plain"]}
    loops: dict[str, OurLoop] = {}
    contenders: dict[str, Callable[[], float]] = {}
    try:
        for name, variant in variants.items():
            loops[name] = OurLoop(variant, indexes, states, runtime)
            bare = _BareLoop(variant, loops[name].preload(), runtime)
            contenders[f"ours, {name}"] = lambda loop=loops[name]: loop.run(num_steps)
            contenders[f"bare, {name}"] = lambda loop=bare: loop.run(num_steps)
        rates = interleave(contenders, rounds)
        waits = {name: loop.wait_fraction for name, loop in loops.items()}
    finally:
        for loop in loops.values():
            loop.stream.close()
    return TrainBench(
        steps_per_round=num_steps,
        rounds=rounds,
        device=str(runtime.device),
        torch_threads=torch.get_num_threads(),
        images_per_second=rates,
        share_of_bare_loop={
            name: rates[f"ours, {name}"] / rates[f"bare, {name}"] for name in variants
        },
        data_wait=waits,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OurLoop:
    """The loop of `pipeline.train`, without its logs and checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        indexes: Sequence[Index],
        states: Sequence[States],
        runtime: Runtime,
    ) -> None:
        self._config, self._runtime = config, runtime
        self._forward = make_forward(config, runtime.device)
        self.strategy = make_strategy(config, runtime)
        self.strategy.warm_up(warm_up_loss(config, self._forward, self.strategy, runtime))
        self.order = make_order(config, indexes)
        self.stream: Stream = open_stream(
            config.data, indexes, self.order, states, device=runtime.device
        )
        self._batches = DeviceBatches(self.stream, runtime.device)
        self._meter = TrainingMeter(runtime, self.stream)
        self._step = 0
        self._seconds = self._stalled = 0.0

    def preload(self) -> list[Batch]:
        """The first batches, kept on the device."""
        return [next(self._batches).copy() for _ in range(NUM_PRELOADED)]

    @property
    def wait_fraction(self) -> float:
        """Share of the measured time spent in the stream's next()."""
        return self._stalled / self._seconds

    def run(self, num_steps: int) -> float:
        """Train and return the rate."""
        started, stalled = time.perf_counter(), self.stream.counters.stall_seconds
        results: object = None
        for _ in range(num_steps):
            samples = self._step * self._config.batch_size
            batch = next(self._batches)
            results = train_step(
                batch, samples, self._config, self._forward, self.strategy, self._meter
            )
            self._step += 1
        _synchronize(self._runtime.device)
        del results  # as in `train`, held from step to step
        seconds = time.perf_counter() - started
        self._seconds += seconds
        self._stalled += self.stream.counters.stall_seconds - stalled
        return num_steps * self._config.batch_size / seconds


class _BareLoop:
    """A loop as written by hand: the same model and losses, on preloaded tensors."""

    def __init__(self, config: TrainConfig, batches: list[Batch], runtime: Runtime) -> None:
        self._config, self._device = config, runtime.device
        self._forward = make_forward(config, runtime.device)
        model = build_autoencoder(
            config.model,
            config.data.decode.event_shape,
            seed=config.seed,
            dtype=parameter_dtype(config.precision),
        )
        self._model = move_model(model, config, runtime.device)
        if config.compile:
            self._model.compile()
        self._optimizer = config.optimizer.build(self._model)
        # With corruption, every step computes its inputs anew.
        self._batches = batches
        self._ready = [self._forward.inputs(batch, "train") for batch in batches]

    def run(self, num_steps: int) -> float:
        """Train and return the rate."""
        config, forward = self._config, self._forward
        weights = config.objective.weights_at(0)
        parameters = list(self._model.parameters())
        started = time.perf_counter()
        for step in range(num_steps):
            index = step % len(self._batches)
            inputs = self._ready[index]
            if config.corruptions:
                inputs = forward.inputs(self._batches[index], "train")
            _, losses = forward.run(self._model, inputs, weights=weights)
            losses.total.mean().backward()
            if config.optimizer.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        _synchronize(self._device)
        return num_steps * config.batch_size / (time.perf_counter() - started)
