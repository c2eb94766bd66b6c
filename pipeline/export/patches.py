"""Mean and variance of exported latents by place in a patch, which FLUX.2's class normalises by."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.latents import LatentDataset
from pipeline.models.interchange.diffusers import PATCH
from pipeline.models.interchange.writing import PatchStatistics

VALUES_AT_ONCE = 1 << 22


def patch_statistics(latents: LatentDataset) -> PatchStatistics:
    """Read all valid rows once, and return their statistics in float64.

    The variance is that of a sample, mu + sigma eps, as the export's own. Raises UserError for
    latents that are no maps of even height and width.
    """
    shape = latents.latent_shape
    if len(shape) != 3 or shape[1] % PATCH or shape[2] % PATCH:
        raise UserError(
            f"{latents.root} holds latents {list(shape)}, but diffusers' class for preset "
            f"flux2 normalises patches of {PATCH} x {PATCH}: export at a size of pictures that "
            "gives even heights and widths, or leave out --latents."
        )
    # Sums about the mean of a channel lose no digits.
    centre = np.asarray(latents.statistics["latents_mean"])
    field = "z" if "z" in latents.fields else "mu"
    rows_at_once = max(1, VALUES_AT_ONCE // int(np.prod(shape)))
    total, square, sigma2 = np.zeros((3, PATCH**2 * shape[0]))
    count = 0
    for start in range(0, len(latents), rows_at_once):
        rows = latents[start : start + rows_at_once]
        values = rows.latents[field][rows.valid].astype(np.float64)
        patches = patchified(values - centre[:, None, None])
        total += patches.sum((0, 2))
        square += np.square(patches).sum((0, 2))
        count += patches.shape[0] * patches.shape[2]
        if "logvar" in latents.fields:
            logvar = rows.latents["logvar"][rows.valid].astype(np.float64)
            sigma2 += patchified(np.exp(logvar)).sum((0, 2))
    offset = total / count
    variance = square / count - offset**2 + sigma2 / count
    mean = np.repeat(centre, PATCH**2) + offset
    return PatchStatistics(torch.from_numpy(mean), torch.from_numpy(variance))


def patchified(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return maps [n, C, H, W] as patches [n, C PATCH^2, positions]: by channel, then by place."""
    n, c, h, w = values.shape
    cut = values.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(n, c * PATCH**2, -1)
