"""The stream of batches that a training run reads."""

from pipeline.data.stream.batch import Batch
from pipeline.data.stream.stream import Quarantined, Stream, open_stream

__all__ = ["Batch", "Quarantined", "Stream", "open_stream"]
