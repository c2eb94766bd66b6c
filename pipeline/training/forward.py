"""From a batch of the stream to losses per image, for training and evaluation alike.

    Batch (stored values) -> device -> clean x in [0, 1] -> corrupted x, mask -> model -> Losses

# B samples
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.common import rng
from pipeline.common.precision import autocast, parameter_dtype
from pipeline.corruptions import Corruption, corrupt
from pipeline.corruptions.latents import LatentTransforms, transform
from pipeline.data.decode import Decode
from pipeline.data.stream import Batch
from pipeline.losses.objective import Gather, Losses, Objective, per_image_losses
from pipeline.losses.terms import Game, Networks
from pipeline.models.autoencoder import ModelOutput, Transform
from pipeline.models.likelihoods import Likelihood

# Training and evaluation draw from separate random streams. Evaluation ignores the epoch, so that
# two evaluations differ only by the weights.
Use = Literal["train", "evaluation"]


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device."""

    clean: Tensor  # [B, *event] in [0, 1], the target
    corrupted: Tensor  # [B, *event], what the encoder sees
    mask: Tensor | None  # bool [B, *event], the corrupted elements
    noise_keys: Tensor  # int64 [B], of the reparametrisation noise
    weight: Tensor  # float32 [B], 0 = the slot holds no sample


@dataclass(frozen=True)
class Forward:
    """Everything besides the weights that the loss of a batch depends on."""

    decode: Decode
    corruptions: tuple[Corruption, ...]
    likelihood: Likelihood
    objective: Objective
    seed: int
    precision: str
    device: torch.device
    memory_format: torch.memory_format  # of pictures
    latent_transforms: LatentTransforms
    networks: Networks  # frozen networks of the objective's terms
    gather: Gather  # for terms over the global batch

    def inputs(self, batch: Batch, use: Use) -> Inputs:
        """Move a batch to the device and corrupt it there."""
        uid = batch.uid.to(self.device, non_blocking=True)
        epoch = batch.epoch.to(self.device, non_blocking=True)
        if use == "evaluation":
            epoch = torch.zeros_like(epoch)
        stored = batch.x.to(self.device, non_blocking=True)
        clean = self.decode.to_unit(stored).to(parameter_dtype(self.precision))
        if clean.ndim == 4:  # in the format of the weights, or convolutions would convert it
            clean = clean.contiguous(memory_format=self.memory_format)
        keys = rng.sample_keys(self.seed, f"{use}/corruption", epoch=epoch, uid=uid)
        corrupted = corrupt(clean, self.corruptions, keys)
        noise_keys = rng.sample_keys(self.seed, f"{use}/posterior", epoch=epoch, uid=uid)
        weight = batch.weight.to(self.device, non_blocking=True)
        return Inputs(clean, corrupted.x, corrupted.mask, noise_keys, weight)

    def run(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        weights: Mapping[str, float],
        samples: int | None = None,
    ) -> tuple[ModelOutput, Losses]:
        """Run the model on one micro-batch.

        weights: current weights of the objective's terms. samples: seen before this step of a
        training. None: an evaluation, without latent transforms and without a discriminator.
        """
        settings: dict[str, Any] = {"keys": inputs.noise_keys}
        mask, term = inputs.mask, self.objective.adversarial
        if samples is not None and (self.latent_transforms or term is not None):
            settings["target"] = inputs.clean
        if samples is not None and term is not None:
            settings["generator_plays"] = weights[term.kind] > 0
        if samples is not None and self.latent_transforms:
            settings["transform"] = self._transform_at(samples)
            mask = None  # the transform moves the marked elements
        with autocast(self.precision, self.device):
            result: ModelOutput | tuple[ModelOutput, Game] = model(inputs.corrupted, **settings)
        output, game = result if isinstance(result, tuple) else (result, None)
        losses = per_image_losses(
            output,
            inputs.clean if output.target is None else output.target,
            likelihood=self.likelihood,
            objective=self.objective,
            weights=weights,
            mask=mask,
            counted=inputs.weight > 0,
            networks=self.networks,
            gather=self.gather,
            game=game,
        )
        return output, losses

    def _transform_at(self, samples: int) -> Transform:
        """Return the transform of latents and targets, the same for the whole step."""
        step = torch.tensor([samples], device=self.device)
        key = rng.sample_keys(self.seed, "train/latents", epoch=torch.zeros_like(step), uid=step)
        return lambda z, target: transform(z, target, self.latent_transforms, key)
