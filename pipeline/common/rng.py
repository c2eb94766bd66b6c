"""Random tensors as pure functions of (seed, stream, epoch, uid, element), without state.

    sample_keys(seed, stream, epoch, uid) -> one 64-bit key per sample
    substream(keys, name)                 -> independent keys for one use (a severity, a mask ...)
    uniform(keys, shape), normal(keys, shape) -> values; element j of a sample depends on its key
    and j

A sample therefore meets the same corruption and the same reparametrisation noise on any number of
processes, in any batch and after any restart. Bits are SplitMix64 (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators", fig. 16) with a different gamma per sample; the
arithmetic is wrapping int64, so they are identical on CPU and CUDA. Uniforms are exact multiples
of 2^-24 and identical everywhere too; normals go through log and cos, which may differ by an ulp
between devices.

# B samples, N elements of one sample
"""

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def initial_weights(seed: int, part: str = "") -> Generator[None]:
    """Let modules draw their first weights from (seed, part); torch's generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_name_key(seed, part) if part else seed)
        yield


def _signed(value: int) -> int:
    """The int64 with the same 64 bits (torch has no arithmetic on uint64)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
_GAMMA_SALT = _signed(0x9E3779B97F4A7C15)


def _name_key(*parts: object) -> int:
    """A 64-bit constant for a name; parts are separated, so ("a", 11) is not ("a1", 1)."""
    text = "/".join(str(part) for part in ("rng-v1", *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def _xorshift_(z: Tensor, bits: int) -> Tensor:
    """z ^= z >>> bits, with the logical shift that int64 lacks."""
    shifted = z.bitwise_right_shift(bits)
    return z.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits)) - 1))


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place: a bijection; every bit depends on all."""
    _xorshift_(z, 30).mul_(_MULTIPLIER_1)
    _xorshift_(z, 27).mul_(_MULTIPLIER_2)
    return _xorshift_(z, 31)


def sample_keys(seed: int, stream: str, *, epoch: Tensor, uid: Tensor) -> Tensor:
    """Return int64 keys [B] for samples `uid` [B] in `epoch` [B], on their device."""
    keys = _mix_(epoch.to(torch.int64) + _name_key(seed, stream))
    return _mix_(keys.bitwise_xor_(_mix_(uid.to(torch.int64) + _GAMMA_SALT)))


def substream(keys: Tensor, name: str) -> Tensor:
    """Return keys [B] independent of `keys` [B] and of every other name's."""
    return _mix_(keys ^ _name_key("substream", name))


def _bits(keys: Tensor, num_elements: int) -> Tensor:
    """32 random bits per element as int32 [B, num_elements rounded up to even]."""
    counter = torch.arange(1, (num_elements + 1) // 2 + 1, device=keys.device)
    gamma = _mix_(keys ^ _GAMMA_SALT).bitwise_or_(1)
    state = (gamma[:, None] * counter).add_(keys[:, None])
    return _mix_(state).view(torch.int32)


def _unit(bits: Tensor) -> Tensor:
    """float32 in [0, 1): the upper 24 of 32 bits."""
    return bits.bitwise_right_shift(8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def uniform(keys: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Return float32 [B, *shape], uniform on [0, 1)."""
    num_elements = math.prod(shape)
    values = _unit(_bits(keys, num_elements))
    return values[:, :num_elements].reshape(len(keys), *shape)


def normal(keys: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Return float32 [B, *shape], standard normal (Box and Muller 1958), |value| < 5.8."""
    num_elements = math.prod(shape)
    pairs = _unit(_bits(keys, num_elements)).view(len(keys), -1, 2)
    # 1 - u lies in (0, 1], so the logarithm is finite.
    radius = pairs[..., 0].neg().log1p_().mul_(-2.0).sqrt_()
    angle = pairs[..., 1] * (2.0 * math.pi)
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return values.view(len(keys), -1)[:, :num_elements].reshape(len(keys), *shape)
