"""The one model: backbone x bottleneck x likelihood.

    x [B, *event] -> encoder -> bottleneck: Code(z, q(z | x)) -> decoder -> decoded [B, *event]

All uses go through `forward`, which also returns the likelihood's learned parameters: calling a
sub-module, or using a parameter outside, would bypass the hooks of DDP and ZeRO.

# B samples; event = shape of one sample; latent = shape of one latent
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.common import rng
from pipeline.common.component import Component, with_tuples
from pipeline.common.precision import widen
from pipeline.models.backbones import Backbone, Burgess, latent_channels
from pipeline.models.bottlenecks import Bottleneck, Code, Gaussian, Posterior
from pipeline.models.likelihoods import GaussianLikelihood, Learned, Likelihood

Mode = Literal["autoencode", "encode", "decode"]
Layer = Callable[[Tensor], Tensor]
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (z, target) -> (z, target)


class ModelConfig(Component):
    """What the network is; the event shape comes from the data."""

    backbone: Backbone = Burgess()  # the networks of encoder and decoder
    bottleneck: Bottleneck = Gaussian()  # from the encoder's output to the latent z
    likelihood: Likelihood = GaussianLikelihood()  # from the decoder's output to the distortion
    # Less memory for one more forward pass; no number changes. See `stages_of`.
    gradient_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in_latent_channels(cls, given: Any) -> Any:
        """Give the bottleneck the size that a backbone's preset has, unless it is given."""
        settings = with_tuples(given)
        if not isinstance(settings, dict):
            return settings
        channels = latent_channels(settings.get("backbone"))
        bottleneck = settings.get("bottleneck", {"kind": "gaussian"})
        if channels is None or not isinstance(bottleneck, dict) or "size" in bottleneck:
            return settings
        return {**settings, "bottleneck": {**bottleneck, "size": channels}}


@dataclass(frozen=True)
class ModelOutput:
    """The result of a forward pass; which fields are set depends on the mode."""

    code: Code | None  # autoencode, encode
    decoded: Tensor | None  # [B, *event], the input of the likelihood; autoencode, decode
    learned: Learned  # the likelihood's own parameters
    target: Tensor | None = None  # [B, *event], the target of `decoded`, if one was given

    @property
    def posterior(self) -> Posterior | None:
        """q(z | x), where there is one."""
        return None if self.code is None else self.code.posterior

    @property
    def z(self) -> Tensor | None:
        """The latents [B, *latent] of the bottleneck, before any transform."""
        return None if self.code is None else self.code.z


class LearnedParameters(nn.Module):
    """The likelihood's own parameters: a module, so that ZeRO-3 gathers them.

    `forward` returns copies, because ZeRO-3 frees a parameter's memory after the call.
    """

    def __init__(self, values: Learned) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self) -> Learned:
        """Return copies by name; gradients flow through them."""
        return {name: value.clone() for name, value in self.named_parameters()}


class AutoEncoder(nn.Module):
    """Encoder, bottleneck and decoder for events of one shape."""

    def __init__(self, config: ModelConfig, event_shape: tuple[int, ...]) -> None:
        """Build the networks; raises ValueError if the backbone does not fit the event shape."""
        super().__init__()
        config.backbone.check_event(event_shape)
        self.config = config
        self.event_shape = event_shape
        self.encoder = config.backbone.encoder(event_shape, config.bottleneck.num_statistics)
        self.decoder = config.backbone.decoder(event_shape, config.bottleneck.size)
        self.bottleneck = config.bottleneck.build()
        self.likelihood = LearnedParameters(config.likelihood.initial())
        self._run_in_stages = run_in_stages

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(Z,) or (Z, H, W), as the backbone determines it."""
        return self.config.backbone.latent_shape(self.event_shape, self.config.bottleneck.size)

    def forward(
        self,
        x: Tensor,
        *,
        keys: Tensor | None = None,
        mode: Mode = "autoencode",
        target: Tensor | None = None,
        transform: Transform | None = None,
    ) -> ModelOutput:
        """Run the parts that `mode` names.

        x: [B, *event] in [0, 1], or latents [B, *latent] in mode decode. keys: int64 [B], the keys
        of the reparametrisation noise; None takes the posterior's mean. target: [B, *event] in
        [0, 1], what x should become. transform: of latents and target, before the decoder.
        """
        learned: Learned = self.likelihood()
        if mode == "decode":
            return ModelOutput(None, widen(self._run(self.decoder, x)), learned)
        code: Code = self.bottleneck(self._run(self.encoder, x), keys)
        if mode == "encode":
            return ModelOutput(code, None, learned)
        z = code.z
        if transform is not None:
            assert target is not None
            z, target = transform(z, target)
        return ModelOutput(code, widen(self._run(self.decoder, z)), learned, target)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Decode latents z [B, *latent] to the mean of p(x | z), images [B, *event] in [0, 1].

        For models of `from_pretrained`; a model that is wrapped for training must be called itself.
        """
        output: ModelOutput = self(z, mode="decode")
        assert output.decoded is not None
        return self.config.likelihood.mean(output.decoded).clamp(0, 1)

    def compile_networks(self) -> None:
        """Compile encoder and decoder, each by itself; the names of their weights stay."""
        self.encoder.compile()
        self.decoder.compile()
        # Gradient checkpointing calls their stages instead.
        self._run_in_stages = torch.compile(run_in_stages)

    def _run(self, network: nn.Module, x: Tensor) -> Tensor:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return self._run_in_stages(network, x)
        return network(x)


def stages_of(network: nn.Module) -> list[Sequence[Layer]]:
    """Return the stages between which gradient checkpointing stores activations.

    A network may name its `stages()`. A chain of n layers is cut into about sqrt(n) stages of about
    sqrt(n) layers, which keeps O(sqrt(n)) activations (Chen et al. 2016, "Training deep nets with
    sublinear memory cost", section 4.1). Any other network is one stage.
    """
    if hasattr(network, "stages"):
        return [[stage] for stage in cast(Any, network).stages()]
    layers = list(network) if isinstance(network, nn.Sequential) else [network]
    num_stages = max(round(math.sqrt(len(layers))), 1)
    cuts = [round(stage * len(layers) / num_stages) for stage in range(num_stages + 1)]
    return [layers[start:end] for start, end in pairwise(cuts)]


def run_in_stages(network: nn.Module, x: Tensor) -> Tensor:
    """Run a network, storing only the inputs of its stages for the backward pass.

    Loss and gradients are bit-equal to `network(x)`.
    """
    for stage in stages_of(network):
        x = checkpoint(run_layers, stage, x, use_reentrant=False)
    return x


def run_layers(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """Run one layer after the other."""
    for layer in layers:
        x = layer(x)
    return x


def build_autoencoder(
    config: ModelConfig, event_shape: tuple[int, ...], *, seed: int, dtype: torch.dtype
) -> AutoEncoder:
    """Build a model whose weights depend only on `seed`; the global generator is untouched."""
    with rng.initial_weights(seed):
        model = AutoEncoder(config, event_shape)
    return model.to(dtype)


def num_parameters(model: nn.Module) -> int:
    """Count the values of all parameters, frozen ones as well."""
    return sum(parameter.numel() for parameter in model.parameters())


def encoder_sha256(model: AutoEncoder) -> str:
    """Return the digest of all that determines latents; it does not depend on the decoder.

    Covers the weights of encoder and bottleneck, and the settings of backbone and bottleneck that
    are not the defaults, so that a setting added later does not change older digests.
    """
    parts = ("encoder.", "bottleneck.")
    weights = {name: t for name, t in model.state_dict().items() if name.startswith(parts)}
    backbone, bottleneck = model.config.backbone, model.config.bottleneck
    settings = [
        {"kind": backbone.kind, **backbone.encoder_settings()},
        {"kind": bottleneck.kind, **bottleneck.model_dump(mode="json", exclude_defaults=True)},
    ]
    text = json.dumps([settings, tensors_sha256(weights)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the one digest of weights, over sorted (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}|{value.dtype}|{list(value.shape)}|".encode())
        flat = value.detach().cpu().reshape(-1)  # at least one dimension, in logical element order
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
