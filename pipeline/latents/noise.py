"""`pipeline.rng` in numpy: the same keys and uniforms to the bit, normals to about one ulp.

Bits and uniforms are integer arithmetic and exact scaling, equal everywhere. Normals are computed
in float64 and rounded, where `pipeline.rng` takes float32 logarithms and cosines of the device: the
two differ by some 1e-6 at most.

# B samples
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

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
    """Two uniforms each for as many pairs as hold `num_elements`: [B, pairs, 2] in [0, 1)."""
    counter = np.arange(1, (num_elements + 1) // 2 + 1, dtype=np.uint64)
    gamma = _mix(keys ^ _GAMMA_SALT) | np.uint64(1)
    state = _mix(gamma[:, None] * counter + keys[:, None])
    bits = state.astype("<u8", copy=False).view("<u4").reshape(len(keys), -1, 2)
    return (bits >> np.uint32(8)).astype(np.float64) * 2.0**-24


def uniform(keys: Keys, shape: Sequence[int] = ()) -> NDArray[np.float32]:
    """Return [B, *shape], uniform on [0, 1): the bits of `pipeline.rng.uniform`."""
    return _shaped(_pairs(keys, math.prod(shape)), shape)


def normal(keys: Keys, shape: Sequence[int] = ()) -> NDArray[np.float32]:
    """Return [B, *shape], standard normal (Box and Muller 1958)."""
    pairs = _pairs(keys, math.prod(shape))
    radius = np.sqrt(-2.0 * np.log1p(-pairs[..., 0]))
    angle = 2.0 * math.pi * pairs[..., 1]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return _shaped(values, shape)


def _shaped(values: NDArray[Any], shape: Sequence[int]) -> NDArray[np.float32]:
    flat = values.reshape(len(values), -1)[:, : math.prod(shape)]
    return flat.astype(np.float32).reshape(len(values), *shape)
