"""Batches on a CPU are the stream's own; tests/gpu has the copies on a GPU."""

import pytest
import torch

from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.data.stream import Stream
from pipeline.data.stream.device import DeviceBatches
from tests.shards import open_stream

NUM_STEPS = 6


def opened(folder, **options) -> Stream:
    data = DataConfig(path=str(folder), decode={"kind": "image", "size": 32}, lanes=2, window=4)
    return open_stream(
        data, index=Index.open(folder), seed=0, batch_size=8, num_steps=NUM_STEPS, **options
    )


def test_on_a_cpu_batches_pass_through_untouched(tiny_shards):
    with opened(tiny_shards) as plain, opened(tiny_shards) as wrapped:
        batches = DeviceBatches(wrapped, torch.device("cpu"))
        for expected in plain:
            found = next(batches)
            assert all(map(torch.equal, found.tensors(), expected.tensors()))
            assert found.keys == expected.keys
        with pytest.raises(StopIteration):
            next(batches)
