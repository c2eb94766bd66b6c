"""Sampled latents z = mu + sigma eps and their noise: the same bits on every machine.

`sample` is used twice: the reader draws from stored moments with it, and an export with
`store: sample` stores its result. The noise is `pipeline.common.rng` in numpy: keys and uniforms
have the same bits, because they are integer arithmetic and exact scaling. Normals are computed
portably in float64 and rounded, while `pipeline.common.rng` uses float32 logarithms and cosines
of the device: the two differ by at most about 1e-6.

# B samples
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.latents.exact_math import portable_cos_sin, portable_exp, portable_log

Keys = NDArray[np.uint64]

STREAM = "latents"
_CACHED_VALUES = 1 << 14  # values per chunk, which fits into the processor's cache

_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_GAMMA_SALT = np.uint64(0x9E3779B97F4A7C15)


def _name_key(*parts: object) -> np.uint64:
    text = "/".join(str(part) for part in ("rng-v1", *parts))
    return np.uint64(
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    )


def _mix(z: Keys) -> Keys:
    """SplitMix64's finalizer; arrays of uint64 wrap around."""
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLIER_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    return z ^ (z >> np.uint64(31))


def sample_keys(seed: int, stream: str, *, epoch: int, uid: NDArray[np.int64]) -> Keys:
    """Return keys [B] for samples `uid` [B] in an epoch."""
    keys = _mix(np.array([epoch], np.int64).view(np.uint64) + _name_key(seed, stream))
    return _mix(keys ^ _mix(uid.astype(np.int64).view(np.uint64) + _GAMMA_SALT))


def _pairs(keys: Keys, num_elements: int) -> NDArray[np.float64]:
    """Return uniforms [B, pairs, 2] on [0, 1), enough pairs for `num_elements`."""
    counter = np.arange(1, (num_elements + 1) // 2 + 1, dtype=np.uint64)
    gamma = _mix(keys ^ _GAMMA_SALT) | np.uint64(1)
    state = _mix(gamma[:, None] * counter + keys[:, None])
    bits = state.astype("<u8", copy=False).view("<u4").reshape(len(keys), -1, 2)
    return (bits >> np.uint32(8)).astype(np.float64) * 2.0**-24


def uniform(keys: Keys, shape: Sequence[int] = ()) -> NDArray[np.float32]:
    """Return [B, *shape], uniform on [0, 1): the bits of `pipeline.common.rng.uniform`."""
    return _shaped(_pairs(keys, math.prod(shape)), shape)


def normal(keys: Keys, shape: Sequence[int] = ()) -> NDArray[np.float32]:
    """Return [B, *shape], standard normal (Box and Muller 1958)."""
    found = np.empty((len(keys), *shape), np.float32)
    at_once = max(1, _CACHED_VALUES // max(1, math.prod(shape)))
    for start in range(0, len(keys), at_once):
        part = slice(start, start + at_once)
        pairs = _pairs(keys[part], math.prod(shape))
        radius = np.sqrt(-2.0 * portable_log(1.0 - pairs[..., 0]))  # 1 - u is exact, and never 0
        cos, sin = portable_cos_sin(pairs[..., 1])
        found[part] = _shaped(np.stack([radius * cos, radius * sin], axis=-1), shape)
    return found


def _shaped(values: NDArray[Any], shape: Sequence[int]) -> NDArray[np.float32]:
    flat = values.reshape(len(values), -1)[:, : math.prod(shape)]
    return flat.astype(np.float32).reshape(len(values), *shape)


def sample(
    mu: NDArray[Any],
    logvar: NDArray[Any],
    rows: NDArray[np.int64],
    *,
    seed: int,
    epoch: int = 0,
    view: str = "identity",
) -> NDArray[np.float32]:
    """Return z = mu + sigma * eps [B, *latent]; eps is keyed by (seed, view, epoch, row, element).

    mu, logvar: [B, *latent]; rows: [B] row numbers in the export.
    """
    stream = STREAM if view == "identity" else f"{STREAM}/{view}"
    eps = normal(sample_keys(seed, stream, epoch=epoch, uid=rows), mu.shape[1:])
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite moments stay non-finite
        sigma: NDArray[Any] = portable_exp(0.5 * logvar.astype(np.float64)).astype(np.float32)
        return mu.astype(np.float32) + sigma * eps
