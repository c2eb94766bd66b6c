"""Bytes that a forward pass keeps for its backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the storages that autograd keeps for `forward`, except `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, torch.UntypedStorage] = {}  # references, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
