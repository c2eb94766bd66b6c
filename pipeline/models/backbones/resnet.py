"""The convolutional autoencoder of latent diffusion: the AutoencoderKL graph and its presets.

Layers and their names: `resnet_layers`. Numbers of parameters of every preset: tests/models/.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from pipeline.common.component import Component, with_tuples
from pipeline.models.backbones.base import BackboneBase, check_picture
from pipeline.models.backbones.resnet_layers import PixelRange, ResnetDecoder, ResnetEncoder, Trunk

Preset = Literal[
    "sd",
    "flux",
    "flux2",
    "ldm-f4",
    "ldm-f16",
    "mar-kl16",
    "va-vae",
    "resnet-s",
    "resnet-xs",
    "resnet-mini",
]
F8 = (128, 256, 512, 512)
F16 = (128, 128, 256, 256, 512)
# By preset: the settings below that differ from the defaults,
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sd": {"widths": F8},  # Stable Diffusion 1, 2 and XL
    "flux": {"widths": F8, "quant_convs": False},  # Stable Diffusion 3, FLUX.1
    "flux2": {"widths": F8},  # FLUX.2
    "ldm-f4": {"widths": (128, 256, 512)},  # latent diffusion, kl-f4
    "ldm-f16": {"widths": F16, "attention": {"levels": (4,)}},  # kl-f16
    "mar-kl16": {"widths": F16, "attention": {"levels": (4,), "decoder_levels": ()}},
    "va-vae": {"widths": F16, "attention": {"levels": (4,)}},
    "resnet-s": {"widths": (64, 128, 256, 256)},
    "resnet-xs": {"widths": (32, 64, 128, 128), "blocks": 1},
    "resnet-mini": {"widths": (16, 32, 32), "blocks": 1, "groups": 8},
}
# and its latent channels: `bottleneck.size`.
LATENT_CHANNELS: Mapping[str, int] = {
    "sd": 4,
    "flux": 16,
    "flux2": 32,
    "ldm-f4": 3,
    "ldm-f16": 16,
    "mar-kl16": 16,
    "va-vae": 32,
    "resnet-s": 16,
    "resnet-xs": 4,
    "resnet-mini": 4,
}

Levels = tuple[NonNegativeInt, ...]
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class AttentionConfig(Component):
    """Where the networks attend; level 0 is the full resolution, each further one is halved."""

    levels: Levels = ()  # of the encoder, and of the decoder where the next one is null
    decoder_levels: Levels | None = None  # of the decoder
    mid: bool = True  # between the two blocks of the lowest resolution


class Resnet(BackboneBase):
    """Spatial latents [Z, H / f, W / f] of pictures whose sides f = 2^(levels - 1) divides."""

    fully_convolutional: ClassVar[bool] = True
    # On a CPU 13% less time than channels-last with resnet-mini, 24% with resnet-xs (64 pixels,
    # batch 8). Not measured on GPUs, where group normalisation copies channels-last maps into the
    # other format and back.
    channels_last: ClassVar[bool] = False

    kind: Literal["resnet"] = "resnet"
    # Fills in the settings below, and the bottleneck's size, where they are not given.
    preset: Preset | None = None
    widths: Widths  # channels of each level, from the full resolution downwards
    decoder_widths: Widths | None = None  # of the decoder, in the same order; null: widths
    blocks: PositiveInt = 2  # residual blocks of an encoder's level; a decoder's has one more
    attention: AttentionConfig = AttentionConfig()
    groups: PositiveInt = 32  # of the group normalisation; divides every width
    quant_convs: bool = True  # 1 x 1 convolutions on both sides of the bottleneck
    # What the pictures' [0, 1] becomes at the networks' ends; all published weights have [-1, 1].
    pixel_range: PixelRange = (-1.0, 1.0)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        settings = with_tuples(given)
        if not isinstance(settings, dict):
            return settings
        name = settings.get("preset")
        if name is None and "widths" not in settings:
            raise ValueError(f"needs a preset ({', '.join(PRESETS)}), or widths")
        # An unknown name is refused as such, without a word about widths.
        preset = PRESETS.get(str(name), PRESETS["sd"]) if name is not None else {}
        filled = {**preset, **settings}
        own = settings.get("attention")
        if isinstance(own, Mapping):
            filled["attention"] = {**preset.get("attention", {}), **own}
        return filled

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        decoder_widths = self.decoder_widths or self.widths
        if len(decoder_widths) != len(self.widths):
            raise ValueError(
                f"decoder_widths has {len(decoder_widths)} levels, but widths has "
                f"{len(self.widths)}: give as many"
            )
        widths = (*self.widths, *decoder_widths)
        for width in widths:
            if width % self.groups:
                common = math.gcd(*widths)
                fitting = ", ".join(str(g) for g in range(1, common + 1) if common % g == 0)
                raise ValueError(
                    f"groups {self.groups} does not divide the width {width}: take multiples of "
                    f"{self.groups} as widths, or set groups to one of {fitting}"
                )
        for name in ("levels", "decoder_levels"):
            for level in getattr(self.attention, name) or ():
                if level >= len(self.widths):
                    raise ValueError(
                        f"attention.{name} names level {level}, but the levels are 0 to "
                        f"{len(self.widths) - 1}"
                    )
        low, high = self.pixel_range
        if not low < high:
            raise ValueError(f"pixel_range must be [lowest, highest], but is [{low}, {high}]")
        return self

    @property
    def factor(self) -> int:
        """Pixels of a picture's side for each of its latent's."""
        return 2 ** (len(self.widths) - 1)

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the event is a picture whose sides `factor` divides."""
        check_picture(self.kind, event_shape, self.factor)

    def latent_shape(self, event_shape: tuple[int, ...], num_channels: int) -> tuple[int, ...]:
        return (num_channels, event_shape[1] // self.factor, event_shape[2] // self.factor)

    def encoder_settings(self) -> dict[str, Any]:
        settings = super().encoder_settings()
        for name in ("preset", "decoder_widths"):  # another way to say the same; the decoder's own
            settings.pop(name, None)
        attention = settings.get("attention", {})
        attention.pop("decoder_levels", None)
        if not attention:
            settings.pop("attention", None)
        return settings

    def encoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        trunk = self._trunk(self.widths, self.attention.levels)
        return ResnetEncoder(event_shape[0], num_channels, trunk)

    def decoder(self, event_shape: tuple[int, ...], num_channels: int) -> nn.Module:
        levels = self.attention.decoder_levels
        trunk = self._trunk(
            self.decoder_widths or self.widths, self.attention.levels if levels is None else levels
        )
        return ResnetDecoder(event_shape[0], num_channels, trunk)

    def _trunk(self, widths: Sequence[int], attention_levels: Sequence[int]) -> Trunk:
        return Trunk(
            widths=widths,
            blocks=self.blocks,
            attention_levels=attention_levels,
            middle_attention=self.attention.mid,
            groups=self.groups,
            quant_conv=self.quant_convs,
            pixel_range=self.pixel_range,
        )


def latent_channels(backbone: object) -> int | None:
    """Return the latent channels of a preset, where the settings of a backbone name one."""
    preset = backbone.get("preset") if isinstance(backbone, Mapping) else None
    preset = backbone.preset if isinstance(backbone, Resnet) else preset
    return LATENT_CHANNELS.get(str(preset))
