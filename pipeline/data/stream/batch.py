"""One rank's part of a global batch, and the reused memory that holds it.

decode threads -> BatchBuffer (ring) -> Batch (views, valid until the next one is asked for)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.decode import ArrayDecode, ImageDecode
from pipeline.data.stream.read_buffers import ReadBuffer

KeyLookup = Callable[[NDArray[np.int64]], list[str]]  # uids -> keys


@dataclass
class Batch:
    """This rank's slots of one global batch, in slot order.

    x: [b, *event] in the stored dtype, images uint8 or uint16 [b, C, H, W] in channels-last memory;
    uid, epoch, label: int64 [b] (label -1: none); weight: float32 [b], 0 for bad samples and for
    the repeats that fill a masked batch. All are views of memory that the stream reuses: valid
    until the next batch is requested.
    """

    x: Tensor
    uid: Tensor
    epoch: Tensor
    weight: Tensor
    label: Tensor
    key_lookup: KeyLookup

    @property
    def keys(self) -> list[str]:
        """The samples' keys, looked up in the index only when requested."""
        return self.key_lookup(self.uid.numpy(force=True))

    def __len__(self) -> int:
        return len(self.uid)

    def split(self, num_parts: int) -> list["Batch"]:
        """Cut into equal micro-batches in slot order, as views."""
        size, rest = divmod(len(self), num_parts)
        assert rest == 0, f"{len(self)} slots do not split into {num_parts} equal parts"
        return [self._slots(slice(i * size, (i + 1) * size)) for i in range(num_parts)]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return x and the columns [b], which share a device."""
        return (self.x, self.uid, self.epoch, self.weight, self.label)

    def copy(self) -> "Batch":
        """Copy to new memory, which the stream does not reuse."""
        return Batch(*(t.clone() for t in self.tensors()), key_lookup=self.key_lookup)

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, asynchronously where the memory is pinned."""
        copies = (tensor.to(device, non_blocking=True) for tensor in self.tensors())
        return Batch(*copies, key_lookup=self.key_lookup)

    def _slots(self, slots: slice) -> "Batch":
        return Batch(*(tensor[slots] for tensor in self.tensors()), key_lookup=self.key_lookup)


class Fault(NamedTuple):
    """A sample that could not be decoded: its slot, and why."""

    slot: int
    stage: str
    reason: str


@dataclass
class BatchBuffer:
    """Memory of one batch, with the inputs of the decode threads."""

    x: Tensor
    uid: NDArray[Any]
    epoch: NDArray[Any]
    weight: NDArray[Any]
    label: NDArray[Any]
    tensors: Batch
    slots: list[NDArray[Any]]  # one writable view per slot
    # Per slot: the buffer, and the bytes of the member in it; None = the sample lacks the member.
    read_buffers: list[ReadBuffer | None] = field(default_factory=list[ReadBuffer | None])
    starts: list[int] = field(default_factory=list[int])
    stops: list[int] = field(default_factory=list[int])
    crc32: list[int] = field(default_factory=list[int])  # -1 = not to be checked
    draws: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    faults: list[Fault] = field(default_factory=list[Fault])
    num_chunks_left: int = 0


def new_buffer(
    decode: ImageDecode | ArrayDecode, num_slots: int, key_lookup: KeyLookup, *, pin: bool
) -> BatchBuffer:
    """Allocate one buffer; `pin` page-locks it for asynchronous copies to a GPU."""
    stored = getattr(torch, decode.stored_dtype.name)
    x = torch.zeros((num_slots, *decode.buffer_shape), dtype=stored, pin_memory=pin)
    uid, epoch, label = torch.zeros((3, num_slots), dtype=torch.int64, pin_memory=pin)
    weight = torch.zeros(num_slots, dtype=torch.float32, pin_memory=pin)
    return BatchBuffer(
        x=x,
        uid=uid.numpy(),
        epoch=epoch.numpy(),
        weight=weight.numpy(),
        label=label.numpy(),
        tensors=Batch(decode.event_view(x), uid, epoch, weight, label, key_lookup),
        slots=list(x.numpy()),
    )
