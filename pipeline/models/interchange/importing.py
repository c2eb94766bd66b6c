"""A model from elsewhere as the project's own folder: `latentmill import-model`.

diffusers folder -> config.json -> settings; single file -> settings, by its weights' shapes
settings + weights, by the model's names -> OUT: `folder`
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.common.console import listing
from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.models.autoencoder import (
    AutoEncoder,
    build_autoencoder,
    encoder_sha256,
    num_parameters,
    tensors_sha256,
)
from pipeline.models.interchange.diffusers import (
    ATTENTION,
    SCALING,
    Flux2Config,
    ForeignConfig,
    KlConfig,
    Size,
    read_config,
)
from pipeline.models.interchange.folder import (
    CONFIG,
    Description,
    StoredValues,
    check_absent,
    save_pretrained,
)
from pipeline.models.interchange.names import to_own
from pipeline.models.interchange.weights import (
    autoencoder_folder,
    check_fit,
    first,
    read_foreign,
)

BN_MEAN, BN_VARIANCE = "bn.running_mean", "bn.running_var"  # of FLUX.2's latents
PIXELS = StoredValues(dtype="uint8", range=(0.0, 255.0))


@dataclass(frozen=True)
class ImportReport:
    """What was imported."""

    source: Path  # the very folder or file that was read
    out: Path
    backbone: str
    preset: str | None
    num_parameters: int
    event_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    weights_sha256: str

    def lines(self) -> list[str]:
        """Return the report for a person: the verdict first."""
        preset = f", preset {self.preset}" if self.preset else ""
        return [
            f"OK  backbone {self.backbone}{preset}, {self.num_parameters:,} parameters",
            *listing(
                {
                    "read": str(self.source),
                    "folder": str(self.out),
                    "takes": f"[B, {', '.join(map(str, self.event_shape))}] in [0, 1]",
                    "gives latents": f"[B, {', '.join(map(str, self.latent_shape))}]",
                    "sha256 of the weights": self.weights_sha256,
                }
            ),
        ]


def import_model(source: Path, out: Path, *, size: Size | None = None) -> ImportReport:
    """Make the new folder `out` from a folder of diffusers or a single .safetensors file.

    size: pixels of a side, or (height, width); None = what the folder says. Raises UserError for
    what cannot be read or is no such model, and if `out` exists.
    """
    check_absent(out)
    description, model = read_foreign_model(source, size=size)
    save_pretrained(out, description, model.state_dict())
    return ImportReport(
        source=autoencoder_folder(source),
        out=out,
        backbone=model.config.backbone.kind,
        preset=getattr(model.config.backbone, "preset", None),
        num_parameters=num_parameters(model),
        event_shape=model.event_shape,
        latent_shape=model.latent_shape,
        weights_sha256=description.weights_sha256,
    )


def read_foreign_model(
    source: Path, *, size: Size | None = None
) -> tuple[Description, AutoEncoder]:
    """Read a folder of diffusers or a single .safetensors file; see `import_model`."""
    folder = autoencoder_folder(source)
    config, version = read_config(folder / CONFIG) if folder.is_dir() else (None, None)
    tensors = read_foreign(folder)
    own = to_own(tensors)
    config = config or derive(source, own, is_flux2=BN_MEAN in tensors)
    size = size or config.sample_size
    if size is None:
        raise UserError(
            f"{source} does not say which size of pictures its model is for: give --size, as 256 "
            "or 256x384."
        )
    decode = ImageDecode.model_validate({"size": size, "channels": config.in_channels})
    model = _build(config, decode.event_shape, own, folder)
    description = Description(
        model=model.config,
        event_shape=model.event_shape,
        latent_shape=model.latent_shape,
        stored=PIXELS,
        decode=decode.model_dump(mode="json"),
        precision="fp32",
        weights="raw",
        weights_sha256=tensors_sha256(model.state_dict()),
        encoder_sha256=encoder_sha256(model),
        step=0,
        samples_seen=0,
        versions={"diffusers": version} if version else {},
        **_scaling(config, tensors),
    )
    return description, model


def _build(
    config: ForeignConfig, event_shape: tuple[int, ...], weights: Mapping[str, Tensor], source: Path
) -> AutoEncoder:
    try:  # the weights of this initialisation are replaced
        model = build_autoencoder(config.model(), event_shape, seed=0, dtype=torch.float32)
    except (UserError, ValueError) as error:
        raise UserError(
            f"{source} is no model for pictures {list(event_shape)}: {error}"
        ) from error
    check_fit(source, weights, model.state_dict())
    model.load_state_dict(weights)
    return model


def derive(source: Path, own: Mapping[str, Tensor], *, is_flux2: bool) -> KlConfig:
    """Return what a file's weights, by the model's names, tell about their model.

    The groups of its normalisation cannot be seen: 32 as in every published one. Raises UserError
    if these are no weights of such a model.
    """
    shapes = {name: value.shape for name, value in own.items()}
    try:
        widths = _widths(shapes, "encoder.down_blocks")
        decoder_widths = _widths(shapes, "decoder.up_blocks")[::-1]
        settings: dict[str, Any] = {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "block_out_channels": widths,
            "down_block_types": _types(shapes, "encoder.down_blocks", "DownEncoderBlock2D"),
            "up_block_types": _types(shapes, "decoder.up_blocks", "UpDecoderBlock2D"),
            "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets.{}.conv2.weight"),
            "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "use_quant_conv": "encoder.quant_conv.weight" in shapes,
            "use_post_quant_conv": "decoder.post_quant_conv.weight" in shapes,
            "sample_size": None,
            "scaling_factor": None,
        }
    except KeyError as error:
        raise UserError(
            f"{source} does not hold an AutoencoderKL, by the names of diffusers, LDM or FLUX: "
            f"{error.args[0]} is not among its {len(own)} tensors ({first(list(own))})."
        ) from error
    if is_flux2:
        return Flux2Config(**settings, decoder_block_out_channels=decoder_widths)
    if decoder_widths != widths:
        raise UserError(
            f"{source} has the widths {list(widths)} in its encoder and {list(decoder_widths)} in "
            "its decoder: of diffusers' models only AutoencoderKLFlux2 may differ."
        )
    return KlConfig(**settings)


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """Return how many of pattern.format(0), pattern.format(1) ... are there; KeyError if none."""
    numbers = range(len(shapes))
    found = next(n for n in numbers if pattern.format(n) not in shapes)
    if not found:
        raise KeyError(pattern.format(0))
    return found


def _widths(shapes: Mapping[str, Any], blocks: str) -> tuple[int, ...]:
    pattern = f"{blocks}.{{}}.resnets.0.conv2.weight"
    return tuple(shapes[pattern.format(n)][0] for n in range(_count(shapes, pattern)))


def _types(shapes: Mapping[str, Any], blocks: str, name: str) -> list[str]:
    levels = range(_count(shapes, f"{blocks}.{{}}.resnets.0.conv2.weight"))
    attends = [f"{blocks}.{level}.attentions.0.to_q.weight" in shapes for level in levels]
    return [f"{ATTENTION * here}{name}" for here in attends]


def _scaling(config: ForeignConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the source says of its latents, as a description has it."""
    if BN_MEAN in tensors:  # by channel and place in a patch, each as often as another
        mean, variance = (tensors[name].double() for name in (BN_MEAN, BN_VARIANCE))
        means, variances = (t.reshape(config.latent_channels, -1) for t in (mean, variance))
        spread = (variances.mean(1) + means.var(1, correction=0)).sqrt()
        return {"latents_mean": means.mean(1).tolist(), "latents_std": spread.tolist()}
    return config.model_dump(include=set(SCALING))
