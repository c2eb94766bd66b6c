"""Names of weights: diffusers' of today and before, latent diffusion's (LDM, FLUX) -> the model's.

The model's names are diffusers', except that the 1 x 1 convolutions beside the bottleneck belong to
encoder and decoder:

    quant_conv.*                   encoder.quant_conv.*
    ...attentions.0.query.*        ...attentions.0.to_q.*                  before 2023
    encoder.mid.attn_1.q.*         encoder.mid_block.attentions.0.to_q.*   [C, C, 1, 1] to [C, C]
    decoder.up.3.block.0.*         decoder.up_blocks.0.resnets.0.*         counted the other way
"""

import re
from collections.abc import Mapping

from torch import Tensor

# Of an autoencoder in the file of a whole diffusion model.
PREFIXES = ("first_stage_model.", "vae.")
# Parts of such files that are no weights of the networks: losses of the training, and FLUX.2's
# statistics of latents.
OTHERS = ("loss.", "bn.")
OWNERS = {"quant_conv": "encoder", "post_quant_conv": "decoder"}
# Patterns of names, one after the other; `decoder.up.K` comes before them. None fits a new name.
RENAMED = (
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
)
_UP = re.compile(r"^decoder\.up\.(\d+)\.")
_MATRIX = re.compile(r"\.attentions\.\d+\.to_(?:q|k|v|out\.0)\.weight$")


def to_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a foreign file by the model's names; unknown names stay as they are."""
    for prefix in PREFIXES:
        within = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        tensors = within or tensors
    levels = [int(found[1]) for name in tensors if (found := _UP.match(name))]
    lowest = max(levels, default=0)
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(OTHERS):
            continue
        renamed = _UP.sub(lambda found: f"decoder.up_blocks.{lowest - int(found[1])}.", name)
        for pattern, replacement in RENAMED:
            renamed = re.sub(pattern, replacement, renamed)
        owner = OWNERS.get(name.partition(".")[0])
        renamed = f"{owner}.{renamed}" if owner else renamed
        if _MATRIX.search(renamed) and value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        own[renamed] = value
    return own


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model's networks by diffusers' names, without the likelihood's."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        owner, _, rest = name.partition(".")
        if owner in OWNERS.values():
            renamed[rest if rest.partition(".")[0] in OWNERS else name] = value
    return renamed
