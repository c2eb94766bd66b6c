"""Batches on the accelerator: the next one is copied while the current one is in use.

Stream (pinned host memory) --side stream, asynchronous copy--> Batch on the device
"""

from collections.abc import Iterator

import torch

from pipeline.data.stream.batch import Batch
from pipeline.data.stream.stream import Stream


class DeviceBatches(Iterator[Batch]):
    """The batches of `stream` on `device`; on the CPU unchanged."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream = stream
        self._device = device
        self._copier: torch.cuda.Stream | None = None
        self._next: Batch | None = None
        if device.type == "cuda":
            self._copier = torch.cuda.Stream(device)
            self._copied = torch.cuda.Event()
            self._next = self._copy()

    def __next__(self) -> Batch:
        """Return the next batch: valid while referenced (GPU), or until the next call (CPU)."""
        if self._copier is None:
            return next(self._stream)
        batch = self._next
        if batch is None:
            raise StopIteration
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(self._copied)
        for tensor in batch.tensors():
            tensor.record_stream(computing)  # keeps the allocator from reusing its memory
        self._next = self._copy()
        return batch

    def _copy(self) -> Batch | None:
        """Start copying the stream's next batch; None at its end."""
        self._copied.synchronize()  # the stream reuses the memory of the previous batch
        host = next(self._stream, None)
        if host is None:
            return None
        with torch.cuda.stream(self._copier):
            batch = host.to(self._device)
            self._copied.record()
        return batch
