"""Pictures of reconstructions: clean | corrupted | reconstruction | absolute error, a row each."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.decode import Decode, ImageDecode

NUM_COLUMNS = 4


def picture_shape(decode: Decode) -> tuple[int, int, int] | None:
    """Return the shape [H, 4W, C] of a row; None for data that are no images."""
    shape = decode.event_shape
    if len(shape) != 3 or shape[0] not in (
        (1, 3, 4) if isinstance(decode, ImageDecode) else (1, 3)
    ):
        return None
    channels, height, width = shape
    return (height, NUM_COLUMNS * width, min(channels, 3))


def picture_rows(
    clean: Tensor, corrupted: Tensor, mean: Tensor, decode: Decode
) -> NDArray[np.uint8] | None:
    """Return the rows of images [n, C, H, W] in [0, 1], as bytes [n, H, 4W, C].

    Alpha is shown as a plain background behind the colours, and its error in each of theirs, where
    it is larger. None for data that are no images.
    """
    if picture_shape(decode) is None:
        return None
    columns = [column.float() for column in (clean, corrupted, mean)]
    error = (columns[0] - columns[2]).abs()
    if isinstance(decode, ImageDecode) and decode.channels == 4:
        level = decode.background / 255
        parts = [(column[:, :3], column[:, 3:].clamp(0, 1)) for column in columns]
        columns = [colour * alpha + level * (1 - alpha) for colour, alpha in parts]
        error = torch.maximum(error[:, :3], error[:, 3:])
    grid = torch.cat([*columns, error], dim=3)  # [n, C, H, 4W]
    grid = grid.clamp(0, 1).mul(255).round().to(torch.uint8)
    return grid.permute(0, 2, 3, 1).numpy(force=True)


def picture_grid(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return rows [n, H, W, C] below each other, as RGB [n * H, W, 3]."""
    picture = rows.reshape(-1, *rows.shape[2:])
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
