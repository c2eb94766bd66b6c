"""config.json of diffusers' autoencoders, and the models that they describe.

    AutoencoderKL        backbone resnet
    AutoencoderKLFlux2   the same with preset flux2, and statistics of latents beside the weights
    AutoencoderTiny      backbone tiny

The package `diffusers` itself is not needed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import PositiveInt, model_validator

from pipeline.common import strict
from pipeline.common.component import Component
from pipeline.common.errors import UserError
from pipeline.models.autoencoder import ModelConfig
from pipeline.models.backbones.resnet import (
    LATENT_CHANNELS,
    PRESETS,
    AttentionConfig,
    Resnet,
    Widths,
)
from pipeline.models.backbones.tiny import Tiny
from pipeline.models.bottlenecks import Deterministic, Gaussian
from pipeline.models.likelihoods import SquaredError

VERSION = "0.42.1"  # of diffusers, whose classes these files are for
PIXEL_RANGE = (-1.0, 1.0)  # of the pictures that its pipelines give and take
ATTENTION = "Attn"  # how types of blocks with attention begin
PATCH = 2  # pixels of a side, of the latents that FLUX.2 normalises
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")

Size = int | tuple[int, int]  # pixels of a side, or (height, width)


class ForeignConfig(Component):
    """config.json of one of diffusers' classes; what is not there has diffusers' default."""

    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    latent_channels: PositiveInt = 4
    sample_size: Size | None = None  # of pictures, where the class has it
    # A pipeline takes (z - shift_factor) * scaling_factor.
    scaling_factor: float | None = None
    shift_factor: float | None = None
    force_upcast: bool = False  # of pipelines in half precision

    def model(self) -> ModelConfig:
        """Return the settings of the same model; its preset by name, where it is one."""
        raise NotImplementedError

    def check_same(self, one: str, other: str) -> None:
        """Raise ValueError unless two settings are equal."""
        if getattr(self, one) != getattr(self, other):
            raise ValueError(
                f"{one} is {getattr(self, one)} and {other} is {getattr(self, other)}: "
                "latentmill's models have both alike"
            )


class KlConfig(ForeignConfig):
    """config.json of AutoencoderKL."""

    block_out_channels: Widths = (64,)  # from the full resolution downwards
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = (
        "DownEncoderBlock2D",
    )
    # The lowest resolution comes first.
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = (
        "UpDecoderBlock2D",
    )
    layers_per_block: PositiveInt = 1
    mid_block_add_attention: bool = True
    act_fn: Literal["silu", "swish"] = "silu"  # two names of one function
    norm_num_groups: PositiveInt = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    sample_size: Size | None = 32
    force_upcast: bool = True
    scaling_factor: float | None = 0.18215
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but block_out_channels has "
                    f"{levels}"
                )
        self.check_same("in_channels", "out_channels")
        self.check_same("use_quant_conv", "use_post_quant_conv")
        return self

    def model(self) -> ModelConfig:
        backbone = named(self._backbone(), self.latent_channels)
        return imported(backbone, self.latent_channels)

    def _backbone(self, decoder_widths: Widths | None = None) -> Resnet:
        levels = _levels(self.down_block_types)
        decoder_levels = _levels(self.up_block_types[::-1])
        return Resnet(
            widths=self.block_out_channels,
            decoder_widths=None if decoder_widths == self.block_out_channels else decoder_widths,
            blocks=self.layers_per_block,
            attention=AttentionConfig(
                levels=levels,
                decoder_levels=None if decoder_levels == levels else decoder_levels,
                mid=self.mid_block_add_attention,
            ),
            groups=self.norm_num_groups,
            quant_convs=self.use_quant_conv,
        )


class Flux2Config(KlConfig):
    """config.json of AutoencoderKLFlux2: its scaling is a batch normalisation of latents."""

    block_out_channels: Widths = (128, 256, 512, 512)
    decoder_block_out_channels: Widths | None = None
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = (
        "DownEncoderBlock2D",
    ) * 4
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = (
        "UpDecoderBlock2D",
    ) * 4
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 32
    sample_size: Size | None = 1024
    scaling_factor: float | None = None
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1
    patch_size: tuple[Literal[2], Literal[2]] = (PATCH, PATCH)  # of positions that it takes as one

    def model(self) -> ModelConfig:
        backbone = self._backbone(self.decoder_block_out_channels)
        return imported(backbone.model_copy(update={"preset": "flux2"}), self.latent_channels)


class TinyConfig(ForeignConfig):
    """config.json of AutoencoderTiny, whose widths and blocks are the same in all published ones.

    The networks take [0, 1], as ours: diffusers' class converts its pipelines' [-1, 1].
    """

    encoder_block_out_channels: tuple[Literal[64], ...] = (64,) * 4
    decoder_block_out_channels: tuple[Literal[64], ...] = (64,) * 4
    block_out_channels: tuple[Literal[64], ...] = (64,) * 4  # written by the class
    num_encoder_blocks: tuple[Literal[1], Literal[3], Literal[3], Literal[3]] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[Literal[3], Literal[3], Literal[3], Literal[1]] = (3, 3, 3, 1)
    act_fn: Literal["relu"] = "relu"
    upsample_fn: Literal["nearest"] = "nearest"
    upsampling_scaling_factor: Literal[2] = 2
    latent_magnitude: Literal[3] = 3  # the decoder squashes latents into (-3, 3)
    latent_shift: float = 0.5  # of latents as pictures, beside the networks
    scaling_factor: float | None = 1.0
    shift_factor: float | None = 0.0

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        self.check_same("in_channels", "out_channels")
        return self

    def model(self) -> ModelConfig:
        return ModelConfig(
            backbone=Tiny(),
            bottleneck=Deterministic(size=self.latent_channels),
            likelihood=SquaredError(),
        )


CLASSES: Mapping[str, type[ForeignConfig]] = {
    "AutoencoderKL": KlConfig,
    "AutoencoderKLFlux2": Flux2Config,
    "AutoencoderTiny": TinyConfig,
}


def read_config(file: Path) -> tuple[ForeignConfig, str | None]:
    """Read config.json of diffusers, and the version that wrote it.

    Raises UserError if it cannot be read, or describes what the model cannot be.
    """
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    name = str(content.get("_class_name")) if isinstance(content, dict) else ""
    if name not in CLASSES:
        raise UserError(
            f"{file} says _class_name {name!r}: of diffusers' models, {', '.join(CLASSES)} can be "
            "read."
        )
    # Names of diffusers' own begin with an underscore.
    settings = {key: value for key, value in content.items() if not key.startswith("_")}
    config = strict.load(CLASSES[name], file, [], text=json.dumps(settings))
    return config, content.get("_diffusers_version")


def imported(backbone: Resnet, latent_channels: int) -> ModelConfig:
    """Return the settings of a model whose weights come from elsewhere."""
    return ModelConfig(
        backbone=backbone,
        bottleneck=Gaussian(size=latent_channels, logvar="clamp"),
        likelihood=SquaredError(),
    )


def named(backbone: Resnet, latent_channels: int) -> Resnet:
    """Return the backbone with its preset's name, if all of its settings are those of one."""
    for name in PRESETS:
        preset = Resnet.model_validate({"preset": name})
        same = preset.model_copy(update={"preset": None}) == backbone
        if same and LATENT_CHANNELS[name] == latent_channels and name != "flux2":
            return preset
    return backbone


def _levels(types: Sequence[str]) -> tuple[int, ...]:
    return tuple(level for level, name in enumerate(types) if name.startswith(ATTENTION))
