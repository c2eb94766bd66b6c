"""webdataset as its README and its own loader class have it: batched in the workers.

Its FAQ's way over ranks without resampling: shards split by node, then by worker.
"""

from pathlib import Path
from typing import Any

import webdataset as wds

from benchmarks.rivals.loader import (
    OurDecoder,
    Task,
    TorchSession,
    pil_to_tensor,
    serve,
    shards_of,
)

SHARD_SHUFFLE, SAMPLE_SHUFFLE = 100, 1000


class Webdataset:
    packages = ("webdataset", "pillow")
    decoders = ("stock", "ours")
    has_state = False

    def prepare(self, task: Task, out: Path) -> None:
        """Nothing: the shards are its format."""

    def open(self, task: Task, state: Any) -> TorchSession:  # noqa: ARG002 - has_state is False
        samples = wds.WebDataset(
            shards_of(task), shardshuffle=SHARD_SHUFFLE, nodesplitter=wds.split_by_node
        ).shuffle(SAMPLE_SHUFFLE)
        if task.our_decoder:
            pairs = samples.to_tuple("cls", "jpg").map_tuple(int, OurDecoder(task.size))
        else:
            pairs = samples.decode("pil").to_tuple("cls", "jpg").map_tuple(int, pil_to_tensor)
        loader = wds.WebLoader(
            pairs.batched(task.batch_size),
            batch_size=None,
            num_workers=task.workers,
            persistent_workers=True,
        )
        return TorchSession(loader, tuple)


if __name__ == "__main__":
    serve(Webdataset())
