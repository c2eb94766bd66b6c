"""Builds the objects of a run from its config."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.common import rng
from pipeline.common.errors import UserError
from pipeline.common.precision import parameter_dtype
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.reader import States
from pipeline.data.order.mixture import Mixture
from pipeline.data.settings import MIN_SAMPLES_JUDGED, DataSource
from pipeline.data.stream.datasets import check_shards, order_of
from pipeline.distributed.gather import RowGather
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import Strategy
from pipeline.distributed.strategies.ddp import DdpStrategy
from pipeline.distributed.strategies.zero import ZeroStrategy
from pipeline.losses.players import Players, freeze
from pipeline.models.autoencoder import AutoEncoder, build_autoencoder
from pipeline.training.forward import Forward, Inputs

M = TypeVar("M", bound=nn.Module)


def check_data(config: TrainConfig, indexes: Sequence[Index]) -> tuple[States, ...]:
    """Raise UserError unless the shards match the indexes and the evaluation split has samples.

    Data that is only evaluated is checked in `training.evaluated`.

    A start checks the shards only here; returns their states, which the streams need.
    """
    states = check_shards(config.data, indexes)
    split, num_held_out = config.evaluation.split, 0
    for source, index in zip(config.data.sources, indexes, strict=True):
        allowed = max_missing(config, source, index)
        index.check_suffixes(config.data.decode.member_suffixes, allowed, split=config.data.split)
        if not config.evaluation.own:
            num_held_out += int(index.counts(split, "evaluation.split").sum())
    if num_held_out == 0 and not config.evaluation.own:
        path = config.data.sources[0].path
        raise UserError(
            f"evaluation.split = {split!r} holds no sample: name another split, or give it a "
            f"larger fraction by `latentmill index {path} --split ...`."
        )
    return states


def max_missing(config: TrainConfig, source: DataSource, index: Index) -> float:
    """Return the fraction of a data set without a wanted member that ends the run for sure.

    The run ends where bad samples exceed data.max_bad_fraction of those delivered, which count as
    MIN_SAMPLES_JUDGED at least. Of an unfinished epoch the missing ones may come last.
    """
    of_all = source.weight / sum(each.weight for each in config.data.sources)
    num_samples = max(int(index.counts(config.data.split).sum()), 1)
    delivered = of_all * config.total_samples
    in_whole_epochs = delivered // num_samples * num_samples or delivered
    judged = max(config.total_samples, MIN_SAMPLES_JUDGED)
    return min(config.data.max_bad_fraction * judged / max(in_whole_epochs, 1), 1.0)


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
        memory_format=memory_format_of(config),
        latent_transforms=config.latent_transforms,
        networks=networks,
        gather=RowGather(),
    )


def build_trained(config: TrainConfig) -> nn.Module:
    """Return the initial autoencoder; with an adversarial term both `Players`.

    Raises UserError if `freeze` does not fit the model.
    """
    shape, dtype = config.data.decode.event_shape, parameter_dtype(config.precision)
    autoencoder = build_autoencoder(config.model, shape, seed=config.seed, dtype=dtype)
    if config.compile:
        autoencoder.compile_networks()
    trained, term = autoencoder, config.objective.adversarial
    if term is not None:
        with rng.initial_weights(config.seed, "discriminator"):
            discriminator = term.build_discriminator(shape)
        trained = Players(autoencoder, discriminator.to(dtype), term)
    freeze(trained, config.freeze)
    return trained


def build_without_memory(config: TrainConfig) -> AutoEncoder:
    """Return the autoencoder on the meta device: names, shapes, and what is frozen.

    Raises UserError if `freeze` does not fit the model.
    """
    with torch.device("meta"):
        trained = build_trained(config)
    autoencoder = trained.autoencoder if isinstance(trained, Players) else trained
    assert isinstance(autoencoder, AutoEncoder)
    return autoencoder


def memory_format_of(config: TrainConfig) -> torch.memory_format:
    """Return the memory format of weights and pictures."""
    return torch.channels_last if config.resolved().channels_last else torch.contiguous_format


def move_model(model: M, config: TrainConfig, device: torch.device) -> M:
    """Move a model to its device and into the config's memory format."""
    # torch's stubs lack this argument
    return model.to(device).to(memory_format=memory_format_of(config))  # pyright: ignore[reportCallIssue]


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
