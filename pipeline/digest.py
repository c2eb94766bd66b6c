"""The one digest of weights: the same wherever they are stored."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest over sorted (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}|{value.dtype}|{list(value.shape)}|".encode())
        flat = value.detach().cpu().reshape(-1)  # of one dimension at least, in logical order
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
