"""One global batch's share of a rank, and the reused memory that it lies in.

decode threads -> BatchBuffer (ring) -> Batch (views, valid until the next one is asked for)
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.decode import ArrayDecode, ImageDecode


@dataclass
class Batch:
    """This rank's slots of one global batch, in slot order.

    x: [b, *event] in the stored dtype, images uint8 [b, C, H, W] in channels-last memory;
    uid, epoch, label: int64 [b] (label -1: the sample has none); weight: float32 [b], 0 for a
    tombstone or the repeats that fill a masked batch; keys: b strings. All but the keys are views
    of memory that the stream uses again: they hold until the next batch is asked for.
    """

    x: Tensor
    uid: Tensor
    epoch: Tensor
    weight: Tensor
    label: Tensor
    keys: list[str]

    def split(self, num_parts: int) -> list["Batch"]:
        """Cut into equal micro-batches in slot order, as views."""
        size, rest = divmod(len(self.keys), num_parts)
        assert rest == 0, f"{len(self.keys)} slots do not split into {num_parts} equal parts"
        return [self._slots(slice(i * size, (i + 1) * size)) for i in range(num_parts)]

    def _slots(self, slots: slice) -> "Batch":
        tensors = (self.x, self.uid, self.epoch, self.weight, self.label)
        return Batch(*(tensor[slots] for tensor in tensors), keys=self.keys[slots])


class Fault(NamedTuple):
    """A sample that could not be decoded: its slot, and why."""

    slot: int
    stage: str
    reason: str


@dataclass
class BatchBuffer:
    """Memory of one batch, with what the decode threads need to fill it."""

    x: Tensor
    uid: NDArray[Any]
    epoch: NDArray[Any]
    weight: NDArray[Any]
    label: NDArray[Any]
    shard: NDArray[Any]
    tensors: Batch
    slots: list[NDArray[Any]]  # one writable view per slot
    data: list[bytes | None] = field(default_factory=list[bytes | None])
    faults: list[Fault] = field(default_factory=list[Fault])
    num_chunks_left: int = 0


def new_buffer(decode: ImageDecode | ArrayDecode, num_slots: int, *, pin: bool) -> BatchBuffer:
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
        shard=torch.zeros(num_slots, dtype=torch.int64).numpy(),
        tensors=Batch(decode.event_view(x), uid, epoch, weight, label, keys=[]),
        slots=list(x.numpy()),
    )
