"""What a model costs: parameters, arithmetic, and the activations that a training keeps.

    settings -> networks of fake tensors, which have shapes and no memory
             -> one forward pass, stage by stage -> floating point operations, bytes kept

The counts hold for the CPU's rules of autocast. What a GPU's libraries need besides, such as the
work space of a convolution, is not in them.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from pipeline.common.precision import autocast, parameter_dtype, widen
from pipeline.models.autoencoder import (
    AutoEncoder,
    ModelConfig,
    num_parameters,
    run_layers,
    stages_of,
)

T = TypeVar("T")
_CPU = torch.device("cpu")
# Under autocast two batches are counted: the difference is what grows with the images.
BATCHES = (16, 32)
_Storages = dict[StorageWeakRef, torch.UntypedStorage]  # references, so that none is freed


@dataclass(frozen=True)
class NetworkCost:
    """An encoder or a decoder."""

    parameters: int
    flops: int  # of one image's forward pass; a multiplication and its addition are two


@dataclass(frozen=True)
class Activations:
    """Bytes that a training step keeps from its forward pass for its backward pass."""

    per_image: int
    once: int  # whatever the micro-batch: under autocast, the weights in bfloat16

    def of(self, num_images: int) -> int:
        """Bytes of a micro-batch."""
        return self.per_image * num_images + self.once


@dataclass(frozen=True)
class ModelCost:
    """An autoencoder for events of one shape, at one precision."""

    parameters: int  # all
    trained: int  # of them, those that are not frozen
    encoder: NetworkCost
    decoder: NetworkCost
    plain: Activations  # kept without gradient checkpointing
    checkpointed: Activations  # with it: what lies between the stages, and the largest stage
    event_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]

    @property
    def latent_ratio(self) -> float:
        """Values of an event for each value of its latent."""
        return math.prod(self.event_shape) / math.prod(self.latent_shape)


def model_cost(
    config: ModelConfig,
    event_shape: tuple[int, ...],
    precision: str,
    frozen: Collection[str] = (),
) -> ModelCost:
    """Count what a model costs; takes seconds and no memory.

    frozen: names of parameters that are not trained. What only they need is not kept: nothing of a
    frozen encoder.
    """
    with FakeTensorMode(), autocast(precision, _CPU):
        model = AutoEncoder(config, event_shape)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        counts = [_count(model, number) for number in (BATCHES if precision == "bf16" else (1,))]
    return ModelCost(
        parameters=num_parameters(model),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        encoder=NetworkCost(num_parameters(model.encoder), counts[0].flops[0]),
        decoder=NetworkCost(num_parameters(model.decoder), counts[0].flops[1]),
        plain=_activations([count.kept for count in counts], precision),
        checkpointed=_activations([count.checkpointed for count in counts], precision),
        event_shape=event_shape,
        latent_shape=model.latent_shape,
    )


def network_cost(
    build: Callable[[], nn.Module], event_shape: tuple[int, ...], precision: str
) -> tuple[int, int]:
    """Return parameters, and bytes kept per image, of a network of images: a discriminator."""
    with FakeTensorMode(), autocast(precision, _CPU):
        network, x = build(), torch.rand(1, *event_shape)
        _, kept = _keeping(lambda: network(x), list(network.parameters()))
    return num_parameters(network), _activations([_bytes(kept)], precision).per_image


@dataclass(frozen=True)
class _Count:
    """One forward pass: operations of encoder and decoder, and bytes that are kept."""

    flops: tuple[int, ...]
    kept: int
    checkpointed: int


def _count(model: AutoEncoder, num_images: int) -> _Count:
    weights = list(model.parameters())
    kept: _Storages = {}
    between: _Storages = {}  # the inputs of the stages
    largest = 0  # what a stage keeps besides its input, when it is computed again
    flops: list[int] = []

    def run(network: nn.Module, x: Tensor) -> Tensor:
        nonlocal largest
        with FlopCounterMode(display=False) as counter:
            for stage in stages_of(network):
                y, here = _keeping(partial(run_layers, stage, x), weights)
                kept.update(here)
                if here:  # else the stage is not computed again
                    between.update(_storage(x))
                inner = {
                    reference: here[reference] for reference in here.keys() - _storage(x).keys()
                }
                largest = max(largest, _bytes(inner))
                x = y
        flops.append(counter.get_total_flops() // num_images)
        return x

    x = torch.rand(num_images, *model.event_shape)
    statistics = run(model.encoder, x)
    keys = torch.arange(num_images)
    code, rest = _keeping(lambda: model.bottleneck(statistics, keys), weights)
    decoded = widen(run(model.decoder, code.z))
    likelihood = model.config.likelihood
    _, here = _keeping(lambda: likelihood.nll(decoded, x, model.likelihood()), weights)
    rest |= here
    return _Count(tuple(flops), _bytes(kept | rest), _bytes(between | rest) + largest)


def _keeping(forward: Callable[[], T], besides: Sequence[Tensor]) -> tuple[T, _Storages]:
    """Return the result of `forward`, and what autograd keeps for it, except `besides`."""
    known = {StorageWeakRef(tensor.untyped_storage()) for tensor in besides}
    kept: _Storages = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storage(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, {reference: s for reference, s in kept.items() if reference not in known}


def _storage(tensor: Tensor) -> _Storages:
    storage = tensor.untyped_storage()
    return {StorageWeakRef(storage): storage}


def _bytes(storages: _Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _activations(kept: Sequence[int], precision: str) -> Activations:
    """From the bytes of one image in float32, or of both BATCHES under autocast."""
    if len(kept) == 1:
        return Activations(kept[0] * parameter_dtype(precision).itemsize // 4, 0)
    small, large = BATCHES
    per_image = (kept[1] - kept[0]) // (large - small)
    return Activations(per_image, kept[0] - small * per_image)
