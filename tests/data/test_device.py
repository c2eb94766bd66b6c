"""Batches on the device: the stream's own on a CPU, copies that stay valid on a GPU."""

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: nothing is copied")
def test_on_a_gpu_batches_are_copies_that_stay_valid(tiny_shards):
    device = torch.device("cuda")
    with opened(tiny_shards) as plain:
        expected = [[t.clone() for t in batch.tensors()] for batch in plain]
    with opened(tiny_shards, device=device) as pinned:
        held = list(DeviceBatches(pinned, device))
    assert len(held) == NUM_STEPS
    for batch, tensors in zip(held, expected, strict=True):
        assert batch.x.device.type == "cuda"
        assert all(map(torch.equal, (t.cpu() for t in batch.tensors()), tensors))
