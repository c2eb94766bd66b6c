"""Builds the objects of a run from its config."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.common import rng, strict
from pipeline.common.console import warn
from pipeline.common.errors import UserError
from pipeline.common.precision import parameter_dtype
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.index.splits import ALL
from pipeline.data.order.mixture import Mixture, reading_plan
from pipeline.data.stream.datasets import check_shards, open_indexes, order_of
from pipeline.distributed.gather import RowGather
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.distributed.strategies.ddp import DdpStrategy
from pipeline.distributed.strategies.zero import ZeroStrategy
from pipeline.losses.players import Players
from pipeline.models.autoencoder import AutoEncoder, build_autoencoder, num_parameters
from pipeline.training.forward import Forward, Inputs
from pipeline.training.sense import doubts

M = TypeVar("M", bound=nn.Module)


def check_data(config: TrainConfig, indexes: Sequence[Index]) -> tuple[States, ...]:
    """Raise UserError unless the shards match the indexes and the evaluation split has samples.

    A start checks the shards only here; returns their states, which the streams need.
    """
    states = check_shards(config.data, indexes)
    split, num_held_out = config.evaluation.split, 0
    for source, index in zip(config.data.sources, indexes, strict=True):
        index.check_suffixes(config.data.decode.member_suffixes)
        names = (*index.split_spec.names, ALL)
        if split not in names:
            known = ", ".join(names)
            raise UserError(
                f"evaluation.split = {split!r}: the index of {source.path} has the splits {known}."
            )
        num_held_out += int(index.counts(split).sum())
    if num_held_out == 0:
        path = config.data.sources[0].path
        raise UserError(
            f"evaluation.split = {split!r} holds no sample: name another split, or give it a "
            f"larger fraction by `latentmill index {path} --split ...`."
        )
    return states


def make_order(config: TrainConfig, indexes: Sequence[Index]) -> Mixture:
    """Return the order of the run's samples."""
    return order_of(config.data, indexes, config.seed, config.batch_size)


def make_forward(config: TrainConfig, device: torch.device) -> Forward:
    """Return what computes losses from batches, with its frozen networks."""
    builders: dict[str, Callable[[], nn.Module]] = {}
    for term in config.objective.regularisers:
        builders |= term.networks()
    dtype = parameter_dtype(config.precision)
    with rng.initial_weights(config.seed, "networks"):
        networks = {
            name: build().to(device, dtype).eval().requires_grad_(False)
            for name, build in builders.items()
        }
    return Forward(
        decode=config.data.decode,
        corruptions=config.corruptions,
        likelihood=config.model.likelihood,
        objective=config.objective,
        seed=config.seed,
        precision=config.precision,
        device=device,
        latent_transforms=config.latent_transforms,
        networks=networks,
        gather=RowGather(),
    )


def build_trained(config: TrainConfig) -> nn.Module:
    """Return the initial autoencoder; with an adversarial term both `Players`."""
    shape, dtype = config.data.decode.event_shape, parameter_dtype(config.precision)
    autoencoder = build_autoencoder(config.model, shape, seed=config.seed, dtype=dtype)
    if config.compile:
        autoencoder.compile()
    term = config.objective.adversarial
    if term is None:
        return autoencoder
    with rng.initial_weights(config.seed, "discriminator"):
        discriminator = term.build_discriminator(shape)
    return Players(autoencoder, discriminator.to(dtype), term)


def move_model(model: M, config: TrainConfig, device: torch.device) -> M:
    """Move a model to its device and into the config's memory format."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    # torch's stubs lack this argument
    return model.to(device).to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]


def make_strategy(config: TrainConfig, runtime: Runtime) -> Strategy:
    """Return the initial model, distributed over the processes."""
    model = move_model(build_trained(config), config, runtime.device)
    term = config.objective.adversarial
    discriminator = None if term is None else term.discriminator
    if runtime.uses_deepspeed:
        return ZeroStrategy(
            model,
            optimizer=config.optimizer,
            discriminator=discriminator,
            ema_decay=config.ema_decay,
            accelerator=runtime.accelerator,
            micro_batch=config.batch_size // (runtime.world * config.accumulation),
            precision=config.precision,
        )
    return DdpStrategy(
        model,
        optimizer=config.optimizer,
        discriminator=discriminator,
        ema_decay=config.ema_decay,
        accelerator=runtime.accelerator,
    )


def warm_up_loss(
    config: TrainConfig, forward: Forward, strategy: Strategy, runtime: Runtime
) -> Tensor:
    """Return a loss of 0 that depends on every parameter, computed from a batch of noise."""
    size = config.batch_size // (runtime.world * config.accumulation)
    dtype = parameter_dtype(config.precision)
    # The rows differ: a term over a batch may be undefined for equal rows.
    keys = torch.arange(size, dtype=torch.int64, device=runtime.device) + runtime.rank * size
    x = rng.uniform(keys, config.data.decode.event_shape).to(dtype)
    inputs = Inputs(x, x, None, keys, weight=torch.ones(size, device=runtime.device))
    weights = config.objective.weights_at(0)
    _, losses = forward.run(strategy.model, inputs, weights=weights, samples=0)
    return losses.total.sum() * 0.0


def describe(config: TrainConfig, *, world: int = 1) -> str:
    """Return what --dry-run prints: the resolved config as YAML, sizes as comments.

    Warns of what is likely to be a mistake. world: processes that the training is to have. Raises
    UserError where the data do not fit.
    """
    config = config.resolved()
    indexes = open_indexes(config.data)
    check_data(config, indexes)
    for what, text in doubts(config, indexes, world):
        warn(f"{what}: {text}")
    order = make_order(config, indexes)
    with torch.device("meta"):
        model = AutoEncoder(config.model, config.data.decode.event_shape)
    steps = order.num_samples / config.batch_size
    return (
        f"{strict.dump(config)}"
        f"# parameters: {num_parameters(model):,}\n"
        f"# reading: {reading_plan(order, world)}\n"
        f"# samples per epoch (split {config.data.split}): {order.num_samples:,}\n"
        f"# steps per epoch: {steps:,.1f}; epochs in {config.num_steps:,} steps: "
        f"{config.num_steps / steps:,.1f}\n"
    )
