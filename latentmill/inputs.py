"""The inputs of `encode`, converted to those of the model by the training's own decoder.

    files, bytes ------------- decode.decode --------+
    PIL images, pixels ------- decode.decode_image --+-> stored values -> to_unit -> x [B, *event]
    arrays of a data set ----- decode.decode_values -+                               in [0, 1]
    floats in [0, 1] --------------------------------------------------------------------^

# B samples; event = shape of one sample; an image's is [C, H, W]
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.data.decode import ArrayDecode, Decode, DecodeError, ImageDecode
from pipeline.data.decode.pixels import Pixels
from pipeline.data.storage import is_url

Picture = str | PathLike[str] | bytes | bytearray | Image.Image | NDArray[Any] | Tensor
Pictures = Picture | Iterable[Picture]
SINGLE = (str, PathLike, bytes, bytearray, Image.Image, np.ndarray, Tensor)

CHANNELS = (1, 3, 4)  # of an array that may be an image: grey, colour, colour and alpha
ROUNDING = 1e-3  # by which floats may leave [0, 1]
WHAT = "paths, bytes, PIL images, uint8 or uint16 arrays, or floats in [0, 1]"


class Item(NamedTuple):
    """One sample that was given."""

    name: str  # for messages
    fill: Callable[[NDArray[Any]], None] | None  # writes its stored values; may raise DecodeError
    unit: Tensor | None = None  # or [*event] in [0, 1], used as given


def list_items(pictures: Pictures, decode: Decode) -> list[Item]:
    """Return the samples one by one, without opening files; UserError for anything else."""
    if isinstance(pictures, SINGLE):
        items = _items_of(pictures, "the input", decode, is_batch_allowed=True)
    elif isinstance(pictures, Iterable) and not isinstance(pictures, Mapping):
        items: list[Item] = []
        for number, picture in enumerate(pictures):
            name = f"input {number}"
            items += _items_of(picture, name, decode, is_batch_allowed=False)
    else:
        raise UserError(f"encode takes {WHAT}, one or a list of them; got {_type(pictures)}.")
    if not items:
        raise UserError("encode was given an empty list or batch.")
    return items


def stack(items: Sequence[Item], decode: Decode, size: int, pool: ThreadPoolExecutor) -> Tensor:
    """Return the items' stored values, decoded, in the first rows of [size, *event].

    Rows of items that were given in [0, 1], and rows behind the last item, hold zeros. Raises
    UserError for an item that cannot be read or decoded.
    """
    dtype = getattr(torch, decode.stored_dtype.name)
    stored = torch.zeros((size, *decode.buffer_shape), dtype=dtype)
    list(pool.map(_fill, items, stored.numpy()))
    return decode.event_view(stored)


def _fill(item: Item, slot: NDArray[Any]) -> None:
    try:
        if item.fill is not None:
            item.fill(slot)
    except DecodeError as error:
        raise UserError(f"{item.name} cannot be used: {error.reason}.") from None
    except OSError as error:
        raise UserError(f"{item.name} cannot be read: {error.strerror or error}.") from None


def _items_of(picture: Any, name: str, decode: Decode, *, is_batch_allowed: bool) -> list[Item]:
    """Return the one sample that `picture` is, or those of a batch."""
    if isinstance(picture, str | PathLike):
        where = str(cast(str | PathLike[str], picture))
        if is_url(where):
            raise UserError(f"{where} is a URL: give a file of this machine, or a file's bytes.")
        return [Item(where, lambda slot: decode.decode(Path(where).read_bytes(), slot))]
    if isinstance(picture, bytes | bytearray):
        return [Item(name, lambda slot: decode.decode(picture, slot))]
    if isinstance(picture, Image.Image):
        return [_of_image(picture, name, decode)]
    if not isinstance(picture, np.ndarray | Tensor):
        raise UserError(f"{name} is {_type(picture)}; encode takes {WHAT}.")
    array = cast(NDArray[Any] | Tensor, picture)
    is_float = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if isinstance(decode, ArrayDecode):
        items = _of_values(_as_numpy(array), name, decode)
    elif is_float:
        items = _of_floats(array, name, decode)
    else:
        items = _of_pixels(_as_numpy(array), name, decode)
    if len(array.shape) > len(decode.event_shape) and not is_batch_allowed:
        raise UserError(
            f"{name} of the list is a batch {_shape(array)}: give one batch, or a list of single "
            "samples."
        )
    return items


def _of_image(image: Image.Image | Pixels, name: str, decode: Decode) -> Item:
    if not isinstance(decode, ImageDecode):
        raise UserError(f"{name} is an image; {_wanted(decode)}, or files of them.")
    return Item(name, lambda slot: decode.decode_image(image, slot))


def _of_floats(array: NDArray[Any] | Tensor, name: str, decode: ImageDecode) -> list[Item]:
    """Return the samples of floats [*event] or [B, *event] in [0, 1]."""
    event = decode.event_shape
    if tuple(array.shape) not in (event, (*array.shape[:1], *event)):
        raise UserError(
            f"{name}: {_wanted(decode)}; got {_shape(array)}. Only files, PIL images, and "
            "uint8 or uint16 arrays are resized, as in training."
        )
    x = array if isinstance(array, Tensor) else torch.tensor(np.array(array, np.float32))
    x = x.detach().to(torch.float32).reshape(-1, *event)
    if len(x):
        low, high = x.min().item(), x.max().item()
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN neither
            raise UserError(
                f"{name}: {_wanted(decode)}; got values in [{low:.6g}, {high:.6g}]. Scale them to "
                "[0, 1], or give pixels as uint8 or uint16."
            )
    return [Item(name, None, one) for one in x]


def _of_pixels(array: NDArray[Any], name: str, decode: ImageDecode) -> list[Item]:
    """Return the images of pixels [H, W], [H, W, C], [C, H, W], or of a batch of the latter two.

    uint8 or uint16, 0 to 255 or 65535: converted to what the model's data has, as files are.
    """
    if array.dtype.name not in ("uint8", "uint16"):
        raise UserError(
            f"{name} has the type {array.dtype}; {_wanted(decode)}, or pixels of the type uint8 or "
            "uint16."
        )
    if array.ndim > 2:
        is_last = array.shape[-1] in CHANNELS
        is_first = array.shape[-3] in CHANNELS
        if array.ndim > 4 or is_last == is_first:
            both = "either end may be the channels" if is_last else "no end can be the channels"
            raise UserError(
                f"{name} is {array.dtype} {_shape(array)}: {both} of an image [H, W, C] or "
                "[C, H, W], or of a batch of them, C being 1, 3 or 4. "
                f"{_wanted(decode).capitalize()}, or PIL images."
            )
        array = np.moveaxis(array, -3, -1) if is_first else array
    elif array.ndim < 2:
        raise UserError(
            f"{name} is {array.dtype} {_shape(array)}; an image is [H, W] or [H, W, C]."
        )
    else:
        array = array[:, :, np.newaxis]
    pictures = np.ascontiguousarray(array if array.ndim == 4 else array[np.newaxis])
    return [_of_image(pixels, name, decode) for pixels in pictures]


def _of_values(array: NDArray[Any], name: str, decode: ArrayDecode) -> list[Item]:
    """Return the samples of values as the data holds them, [*event] or [B, *event]."""
    event = decode.event_shape
    if tuple(array.shape) not in (event, (*array.shape[:1], *event)):
        raise UserError(f"{name}: {_wanted(decode)}; got {_shape(array)}.")
    if array.dtype != decode.stored_dtype:
        raise UserError(f"{name}: {_wanted(decode)}; got {array.dtype}.")

    def item(values: NDArray[Any]) -> Item:
        return Item(name, lambda slot: decode.decode_values(values, slot))

    return [item(values) for values in array.reshape(-1, *event)]


def _wanted(decode: Decode) -> str:
    event = ", ".join(map(str, decode.event_shape))
    if isinstance(decode, ImageDecode):
        return f"this model takes [B, {event}] in [0, 1]"
    low, high = decode.range
    return f"this model takes {decode.dtype} [B, {event}] in [{low:g}, {high:g}], as its data holds"


def _as_numpy(array: NDArray[Any] | Tensor) -> NDArray[Any]:
    if not isinstance(array, Tensor):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()


def _shape(array: NDArray[Any] | Tensor) -> str:
    return str(list(array.shape))


def _type(value: object) -> str:
    return f"a {type(value).__name__}"
